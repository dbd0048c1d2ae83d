#!/usr/bin/env bash
# The files of the image, without a builder of images: an environment with the locked dependencies and the project in it.
#
#   k8s/build_tree.sh cpu FOLDER                  install from the package index (k8s/Dockerfile does this)
#   k8s/build_tree.sh gpu FOLDER                  the same with CUDA
#   k8s/build_tree.sh cpu FOLDER --reuse VENV     take the dependencies of an environment that is there (seconds)
#
# FOLDER must not exist. Needs Python 3.11 to 3.13 with venv ($PYTHON, else python3); as any user.
set -euo pipefail

variant=${1:?cpu or gpu}; tree=${2:?the folder to make}; reuse=
[ "${3:-}" = --reuse ] && reuse=$(cd "${4:?an environment}" && pwd)
case $variant in cpu|gpu) ;; *) echo "build_tree.sh: $variant: neither cpu nor gpu" >&2; exit 2 ;; esac
[ -e "$tree" ] && { echo "build_tree.sh: $tree is there already" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$([ -n "$reuse" ] && echo "$reuse/bin/python" || echo python3)}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT

"$python" -m venv --without-pip "$tree"
tree=$(cd "$tree" && pwd)
packages=$("$tree/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

if [ -n "$reuse" ]; then
  uv=$reuse/bin/uv
  # As a path, not as a site: what that environment has installed in editable form stays out.
  "$reuse/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$packages/reused.pth"
  printf '#!%s/bin/python\nimport sys\nfrom ray.scripts.scripts import main\nsys.exit(main())\n' "$tree" > "$tree/bin/ray"
  chmod +x "$tree/bin/ray"
else
  "$python" -m venv "$work/uv"
  sed -n '/^uv==/,/# via/p' "$root/requirements.lock" > "$work/uv.txt"
  "$work/uv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$work/uv.txt"
  uv=$work/uv/bin/uv
  case $variant in
    cpu) "$python" "$root/k8s/locked.py" demo openvino > "$work/locked.txt" ;;
    gpu) cp "$root/k8s/gpu.lock" "$work/locked.txt" ;;
  esac
  "$uv" pip install --python "$tree/bin/python" --no-cache --compile-bytecode --require-hashes -r "$work/locked.txt"
fi

# A copy: setuptools writes beside the sources.
mkdir "$work/project"
cp -R "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$root/engine" "$root/jobs" "$work/project/"
"$uv" pip install --quiet --python "$tree/bin/python" --no-deps --no-index --no-build-isolation --compile-bytecode \
  "$work/project"
