#!/bin/sh
# Builds the images klein-stage and klein-orchestrator, with docker or buildah.
#
#   ./deploy/docker/build.sh [--cpu] [OPTION ...] [-- BUILDER ARGUMENT ...]
#
#   --cpu               torch's CPU-only build instead of the one for CUDA
#   --only TARGET       one of stage, orchestrator and orchestrator-signing, which is not built otherwise
#   --base IMAGE        base image; give python:3.11-slim-bookworm@sha256:… to pin it
#   --prefix NAME       names are NAME-stage and NAME-orchestrator; by default klein
#   --tag TAG           by default the version in pyproject.toml
#   --wheels FOLDER     wheels that pip finds before an index
#   --pip-conf FILE     pip's configuration: index, mirror, password; no layer has it
#   --ca FILE           certificates of that index, as PEM; no layer has them
# Arguments after -- go to the builder: -- --network host
set -eu
# shellcheck source=deploy/docker/engine.sh
. "$(dirname "$0")/engine.sh"
root=$(cd "$(dirname "$0")/../.." && pwd)

torch=cuda targets="orchestrator stage" base='' prefix=klein tag='' wheels='' pip_conf='' ca=''
while [ $# -gt 0 ]; do
    case $1 in
        --cpu) torch=cpu && shift && continue ;;
        --) shift && break ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit 0 ;;
        --only | --base | --prefix | --tag | --wheels | --pip-conf | --ca) ;;
        *) fail "$1 is no option; --help shows all" ;;
    esac
    [ $# -gt 1 ] || fail "$1 needs a value"
    case $1 in
        --only) targets=$2 ;;
        --base) base=$2 ;;
        --prefix) prefix=$2 ;;
        --tag) tag=$2 ;;
        --wheels) wheels=$2 ;;
        --pip-conf) pip_conf=$2 ;;
        --ca) ca=$2 ;;
    esac
    shift 2
done
case $targets in
    stage | orchestrator | orchestrator-signing | "orchestrator stage") ;;
    *) fail "--only is $targets; it must be stage, orchestrator or orchestrator-signing" ;;
esac
[ -z "$wheels" ] || [ -d "$wheels" ] || fail "--wheels is $wheels; there is no such folder"
for file in "$pip_conf" "$ca"; do
    [ -z "$file" ] || [ -r "$file" ] || fail "$file cannot be read"
done

builder=$(engine_for_building)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")
revision=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git -C "$root" status --porcelain 2>/dev/null)" ] || revision=$revision-modified
tag=${tag:-$version}

set -- --file "$root/deploy/docker/Dockerfile" --build-arg "TORCH=$torch" --build-arg "VERSION=$version" \
    --build-arg "REVISION=$revision" "$@"
[ -z "$base" ] || set -- --build-arg "BASE_IMAGE=$base" "$@"
[ -z "$wheels" ] || set -- --build-context "wheels=$wheels" "$@"
[ -z "$pip_conf" ] || set -- --secret "id=pip_conf,src=$pip_conf" "$@"
[ -z "$ca" ] || set -- --secret "id=ca_certificates,src=$ca" "$@"
[ "$builder" != buildah ] || set -- --layers "$@"

for target in $targets; do
    started=$(date +%s)
    DOCKER_BUILDKIT=1 "$builder" build "$@" --target "$target" --tag "$prefix-$target:$tag" "$root" ||
        fail "$prefix-$target was not built. pip cannot find a package: --pip-conf, --ca and --wheels make an index \
or a folder known to it; torch's CPU-only build is on no default index"
    echo "build.sh: $prefix-$target:$tag in $(($(date +%s) - started)) s"
done
