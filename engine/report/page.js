"use strict";
// Without this the page says the same: the slider's figures are also in a table, tables come in their own order, and the
// rows of a cell are in the gallery.

function followSlider() {
  const slider = document.getElementById("slider");
  if (!slider) return;
  const steps = JSON.parse(document.getElementById("steps").textContent);
  const input = document.getElementById("min-confidence");
  const parts = slider.querySelectorAll("[data-part]");
  const gauges = slider.querySelectorAll("[data-gauge]");
  const show = () => {
    const step = steps[Number(input.value)];
    parts.forEach((part) => { part.textContent = step[Number(part.dataset.part)]; });
    gauges.forEach((gauge) => { gauge.style.setProperty("--share", (parseFloat(step[Number(gauge.dataset.gauge)]) || 0) / 100); });
    input.setAttribute("aria-valuetext", step[0]);
  };
  input.addEventListener("input", show);
  slider.hidden = false;
  show();
}

// Cells without a number come after those with one, whichever way the column is sorted.
function compare(one, other, sign) {
  const numbers = [one, other].map((cell) => cell.dataset.value);
  if (numbers[0] !== undefined && numbers[1] !== undefined) return sign * (Number(numbers[0]) - Number(numbers[1]));
  if (numbers[0] !== undefined) return -1;
  if (numbers[1] !== undefined) return 1;
  return sign * one.textContent.localeCompare(other.textContent, undefined, { numeric: true });
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((one, other) => compare(one.cells[column], other.cells[column], sign));
      table.tBodies[0].append(...rows);
    });
  });
}

function openRows(cell) {
  const dialog = document.getElementById("opened");
  const cards = [...document.querySelectorAll(`#gallery [data-cell="${cell.dataset.opens}"]`)];
  const heading = document.getElementById("opened-heading");
  heading.textContent = `${cell.dataset.words}: ${cards.length} shown`;
  dialog.querySelector(".cards").replaceChildren(...cards.map((card) => card.cloneNode(true)));
  dialog.showModal();
  heading.focus();
}

function makeOpenable(cell) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = cell.textContent;
  button.setAttribute("aria-label", cell.dataset.words);
  button.addEventListener("click", () => openRows(cell));
  cell.replaceChildren(button);
}

// Rows and columns of the matrix move together.
function orderMatrix() {
  const matrix = document.getElementById("matrix");
  const select = document.getElementById("matrix-order");
  if (!matrix || !select) return;
  const head = matrix.tHead.rows[0];
  const named = [...matrix.tBodies[0].rows].map((row, place) => {
    const counts = [...row.cells].slice(1).map((cell) => Number(cell.textContent.replaceAll(",", "")));
    const rows = counts.reduce((sum, count) => sum + count, 0);
    return { row, rows, recall: rows ? counts[place] / rows : 2, cells: [...row.cells], title: head.cells[place + 1] };
  });
  select.addEventListener("change", () => {
    const order = named.map((_, place) => place);
    if (select.value === "recall") order.sort((one, other) => named[one].recall - named[other].recall);
    if (select.value === "rows") order.sort((one, other) => named[other].rows - named[one].rows);
    head.append(...order.map((place) => named[place].title));
    order.forEach((place) => {
      const { row, cells } = named[place];
      row.append(...order.map((column) => cells[column + 1]));
      matrix.tBodies[0].append(row);
    });
  });
}

function showOneClass() {
  const select = document.getElementById("map-class");
  if (!select) return;
  select.addEventListener("change", () => {
    document.querySelectorAll("#map [data-class]").forEach((part) => {
      part.classList.toggle("dim", select.value !== "" && part.dataset.class !== select.value);
    });
  });
}

followSlider();
document.querySelectorAll("table[data-sortable]").forEach(makeSortable);
document.querySelectorAll("[data-opens]").forEach(makeOpenable);
orderMatrix();
showOneClass();
document.querySelectorAll(".scripted").forEach((one) => { one.hidden = false; });
document.getElementById("close")?.addEventListener("click", () => document.getElementById("opened").close());
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
