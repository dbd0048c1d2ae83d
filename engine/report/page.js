"use strict";
// Without this the page says the same: the slider's figures are also in a table, and tables come in their own order.

function followSlider() {
  const slider = document.getElementById("slider");
  if (!slider) return;
  const steps = JSON.parse(document.getElementById("steps").textContent);
  const input = document.getElementById("min-confidence");
  const parts = slider.querySelectorAll("[data-part]");
  const show = () => {
    const step = steps[Number(input.value)];
    parts.forEach((part) => { part.textContent = step[Number(part.dataset.part)]; });
    input.setAttribute("aria-valuetext", step[0]);
  };
  input.addEventListener("input", show);
  slider.hidden = false;
  show();
}

function compare(one, other) {
  const numbers = [one, other].map((cell) => cell.dataset.value);
  if (numbers[0] !== undefined && numbers[1] !== undefined) return Number(numbers[0]) - Number(numbers[1]);
  if (numbers[0] !== undefined) return -1;
  if (numbers[1] !== undefined) return 1;
  return one.textContent.localeCompare(other.textContent, undefined, { numeric: true });
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
      rows.sort((one, other) => sign * compare(one.cells[column], other.cells[column]));
      table.tBodies[0].append(...rows);
    });
  });
}

followSlider();
document.querySelectorAll("table[data-sortable]").forEach(makeSortable);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
