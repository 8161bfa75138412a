# Sourced by the scripts of this folder: the programs that build and run images.
# shellcheck shell=sh

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# The command docker alone is not enough: it may be there without its daemon.
docker_runs() {
    command -v docker >/dev/null && docker info >/dev/null 2>&1
}

# Prints the program that runs containers; KLEIN_CONTAINER_ENGINE chooses one.
engine_for_running() {
    if [ -n "${KLEIN_CONTAINER_ENGINE:-}" ]; then
        command -v "$KLEIN_CONTAINER_ENGINE" >/dev/null || fail "there is no $KLEIN_CONTAINER_ENGINE here"
        echo "$KLEIN_CONTAINER_ENGINE"
    elif docker_runs; then
        echo docker
    elif command -v podman >/dev/null; then
        echo podman
    else
        fail "docker (with its daemon) or podman is needed"
    fi
}

# Prints the program that builds images; KLEIN_IMAGE_BUILDER chooses one.
engine_for_building() {
    if [ -n "${KLEIN_IMAGE_BUILDER:-}" ]; then
        command -v "$KLEIN_IMAGE_BUILDER" >/dev/null || fail "there is no $KLEIN_IMAGE_BUILDER here"
        echo "$KLEIN_IMAGE_BUILDER"
    elif docker_runs; then
        echo docker
    elif command -v buildah >/dev/null; then
        echo buildah
    else
        fail "docker (with its daemon) or buildah is needed"
    fi
}
