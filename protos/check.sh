#!/bin/sh
# Lints the protos with buf where npm is there: style, format, and no breaking change against main.
set -eu
cd "$(dirname "$0")"
if ! command -v npx >/dev/null 2>&1; then
    echo "protos: npm is not installed, so buf was not run" >&2
    exit 0
fi
buf() { npx --yes --package=@bufbuild/buf@1.75.0 buf "$@"; }
buf lint
buf format --diff --exit-code
if git rev-parse --quiet --verify origin/main:protos/buf.yaml >/dev/null 2>&1; then
    buf breaking --against '../.git#ref=origin/main,subdir=protos'
fi
echo "protos: buf found nothing"
