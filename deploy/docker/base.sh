#!/bin/sh
# Makes a base image from Debian's packages, where no registry has one: a slim Debian with Python and its venv module.
# Needs root, debootstrap, and docker or podman.
#
#   ./deploy/docker/base.sh [NAME]     by default localhost/klein-base:bookworm
#   DEBIAN_MIRROR=URL                  mirror of Debian; by default debootstrap's own
set -eu
# shellcheck source=deploy/docker/engine.sh
. "$(dirname "$0")/engine.sh"

name=${1:-localhost/klein-base:bookworm}
command -v debootstrap >/dev/null || fail "debootstrap is needed: apt-get install debootstrap"
[ "$(id -u)" = 0 ] || fail "debootstrap needs root"
engine=$(engine_for_running)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
root=$folder/root

debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
    bookworm "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} > "$folder/log" 2>&1 || {
    tail -n 20 "$folder/log" >&2
    fail "debootstrap failed"
}
# As in Debian's slim images: no package lists, no manuals, no translations; licenses stay.
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/var/log/* "$root"/usr/share/man/* \
    "$root"/usr/share/info/* "$root"/usr/share/locale/*
find "$root/usr/share/doc" -type f ! -name copyright -delete
tar -C "$root" -c . | "$engine" import - "$name" >/dev/null
echo "base.sh: $name"
