#!/bin/sh
# Refresh requirements-dev.lock from pyproject.toml with uv: one pin a package, valid for every
# supported Python; pins that still fit are kept.
#
# Usage: scripts/lock.sh UV [UV_ARGUMENT...]      (for instance --upgrade-package pytest)
set -eu

uv=$1
shift
lock=requirements-dev.lock
new=$lock.new
trap 'rm -f "$new"' EXIT
[ ! -f "$lock" ] || cp "$lock" "$new"
UV_PYTHON_DOWNLOADS=never "$uv" pip compile pyproject.toml --extra dev --universal \
    --python-version 3.10 --no-header --no-annotate --quiet --output-file "$new" "$@"

# uv repeats the project's own bounds in every marker: keep only what tells Pythons apart.
sed -e "/os_name == 'nt'/d" -e "/sys_platform == 'emscripten'/d" \
    -e "s/ ; \(python_full_version [<>=]* '3\.1[0-3][.0-9]*'\).*/ ; \1/; t" \
    -e 's/ ;.*//' "$new" >"$lock"
