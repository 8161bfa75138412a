#!/bin/sh
# Renders overlays/pico into install.yaml.
set -eu
cd "$(dirname "$0")"
kustomize=../../.tools/bin/kustomize
[ -x "$kustomize" ] || kustomize=$(command -v kustomize) || {
    echo "render.sh: there is no kustomize here: run deploy/tools/install.sh" >&2
    exit 1
}
rendered=$("$kustomize" build overlays/pico)
printf '# Rendered from overlays/pico; see README.md.\n---\n%s\n' "$rendered" > install.yaml
