#!/bin/sh
# Lints the protos with buf where npm is there: style, format, and no breaking change.
set -eu
cd "$(dirname "$0")"
if ! command -v npx >/dev/null 2>&1; then
    echo "protos: npm is not installed, so buf was not run" >&2
    exit 0
fi
buf() { npx --yes --package=@bufbuild/buf@1.75.0 buf "$@"; }

# The last release; without one, the version before the last change of the protos, committed or not.
base() {
    if git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null; then
        return
    elif git diff --quiet HEAD -- '*.proto'; then
        git rev-parse --quiet --verify "$(git log -1 --format=%H -- '*.proto')^"
    else
        git rev-parse HEAD
    fi
}

buf lint
buf format --diff --exit-code
against=$(base 2>/dev/null || true)
if [ -n "$against" ] && git rev-parse --quiet --verify "$against:./buf.yaml" >/dev/null; then
    before=$(mktemp -d)
    trap 'rm -rf "$before"' EXIT
    git archive "$against" . | tar -x -C "$before"
    buf breaking --against "$before"
    echo "protos: buf found nothing, and nothing that breaks callers of $(git describe --tags --always "$against")"
else
    echo "protos: buf found nothing; breaking changes were NOT checked: there is no earlier version here" >&2
fi
