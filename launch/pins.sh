#!/usr/bin/env bash
# Renews launch/requirements-*.txt from pyproject.toml: each package with its version and the hashes of its files.
#   bash launch/pins.sh               adds what pyproject.toml newly names, and keeps all other versions
#   bash launch/pins.sh --upgrade     takes the newest versions; --upgrade-package=NAME that of one package
# Needs uv on PATH: python -m venv /tmp/uv && /tmp/uv/bin/pip install uv && PATH=$PATH:/tmp/uv/bin bash launch/pins.sh
# [tool.uv] in pyproject.toml says for which Pythons, and why torch stands alone in requirements-torch.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pins=launch/requirements
all=$(mktemp)
trap 'rm -f "$all"' EXIT
cat $pins-*.txt >"$all" # the versions so far, which uv keeps
uv pip compile --quiet pyproject.toml --all-extras --output-file "$all" "$@"

compile() { # compile FILE INPUT [OPTIONS]: of the versions that fit together
  uv pip compile --quiet --constraint "$all" --no-emit-package torch --output-file "$@"
}

echo setuptools | compile $pins-build.txt -
echo uv | compile $pins-uv.txt - "$@" # no package needs it: its version is that of the file, or the newest
compile $pins-run.txt pyproject.toml
mapfile -t run < <(sed -n 's/^\([^ =]*\)==.*/--no-emit-package=\1/p' $pins-run.txt | sort -u)
for extra in app cuda12 docs gcs test tpu; do # each has what comes on top of requirements-run.txt
  compile $pins-$extra.txt pyproject.toml --extra "$extra" "${run[@]}"
done
