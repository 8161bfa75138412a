#!/bin/sh
# Runs the four containers with pico on the CPU, under the constraints of the Pods, and makes a picture.
#
#   ./deploy/docker/smoke.sh [--prefix NAME] [--tag TAG] [--picture FILE]
#
# Checks the constraints from inside, the picture's colors, that process 1 leaves no zombie, and that SIGTERM drains
# under load with exit code 0. Needs docker or podman; no port of the machine is used. Every wait has an end.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=deploy/docker/engine.sh
. "$here/engine.sh"

prefix=klein tag=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../../pyproject.toml") picture=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit 0 ;;
        --prefix | --tag | --picture) [ $# -gt 1 ] || fail "$1 needs a value" ;;
        *) fail "$1 is no option; --help shows all" ;;
    esac
    case $1 in
        --prefix) prefix=$2 ;;
        --tag) tag=$2 ;;
        --picture) picture=$(realpath -m "$2") ;;
    esac
    shift 2
done
engine=$(engine_for_running)
stage_image=$prefix-stage:$tag orchestrator_image=$prefix-orchestrator:$tag
for image in "$stage_image" "$orchestrator_image"; do
    "$engine" image inspect "$image" >/dev/null 2>&1 || fail "there is no image $image: run deploy/docker/build.sh"
done

run=klein-smoke-$$
out=$(mktemp -d)
chmod 0777 "$out"
cd "$out" # some runtimes leave files in the current folder
containers="$run-orchestrator $run-vae-decoder $run-denoiser $run-generate $run-early $run-control $run-text-encoder"
finish() {
    code=$?
    if [ $code != 0 ]; then
        for each in $containers; do
            echo "--- last lines of $each" >&2
            "$engine" logs --tail 5 "$each" 2>&1 | tail -n 5 >&2
        done
    fi
    # shellcheck disable=SC2086  # names without spaces; the last one owns the network of the others
    for each in $containers; do "$engine" rm -f "$each" >/dev/null 2>&1 || true; done
    rm -rf "$out"
    exit $code
}
trap finish EXIT
trap 'exit 130' INT TERM

# Pod Security "restricted", and the volumes and limits of deploy/kubernetes/base. The uid is not in /etc/passwd.
start() { # name, network, memory, image, arguments ...
    name=$1 network=$2 memory=$3
    shift 3
    "$engine" run --detach --name "$run-$name" --network "$network" --user 20001:20001 --read-only \
        --cap-drop ALL --security-opt no-new-privileges --pids-limit 512 \
        --memory "$memory" --memory-swap "$memory" --tmpfs /tmp:rw,noexec,nosuid,nodev,size=64m \
        --volume "$out:/out" ${entrypoint:+--entrypoint "$entrypoint"} \
        --env KLEIN_DRAIN_DELAY_SECONDS=1 --env KLEIN_GRACE_SECONDS=120 "$@" >/dev/null
}
inside() { # name, command ...
    name=$1
    shift
    "$engine" exec "$run-$name" "$@"
}
seconds() { date +%s; }
expect() { # what, actual, wanted
    [ "$2" = "$3" ] || fail "$1 is '$2'; it must be '$3'"
}
wait_until() { # seconds, what, command ...
    limit=$1 what=$2 end=$(($(seconds) + $1))
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$(seconds)" -lt "$end" ] || fail "$what did not happen in $limit s"
        sleep 0.5
    done
}
is_stopped() { [ "$("$engine" inspect --format '{{.State.Running}}' "$run-$1")" = false ]; }
exit_code() { "$engine" inspect --format '{{.State.ExitCode}}' "$run-$1"; }

# --- four containers; all share the network of the first, which has only a loopback device
began=$(seconds)
start text-encoder none 1g "$stage_image" serve text-encoder
shared=container:$run-text-encoder
start denoiser "$shared" 1g "$stage_image" serve denoiser
start vae-decoder "$shared" 1g "$stage_image" serve vae-decoder
start orchestrator "$shared" 384m --env KLEIN_DEFAULT_SIZE_PX=128 --env KLEIN_MAXIMUM_PIXEL_COUNT=65536 \
    "$orchestrator_image" serve orchestrator
for stage in text-encoder denoiser vae-decoder orchestrator; do
    wait_until 180 "readiness of $stage" inside $stage python3 -m klein_services.cli.probe $stage
done
echo "smoke.sh: four containers serve after $(($(seconds) - began)) s"

# --- the constraints hold for the server, which is a child of process 1
for stage in text-encoder denoiser vae-decoder orchestrator; do
    # shellcheck disable=SC2016  # the container's shell expands these
    inside $stage sh -c 'read -r server _ < /proc/1/task/1/children; cat "/proc/$server/status"' > status
    field() { sed -n "s/^$1:[[:space:]]*\([^[:space:]]*\).*/\1/p" status; }
    expect "the uid of $stage" "$(field Uid)" 20001
    expect "the effective capabilities of $stage" "$(field CapEff)" 0000000000000000
    expect "no_new_privs of $stage" "$(field NoNewPrivs)" 1
    ! inside $stage touch /usr/written 2>/dev/null || fail "the root file system of $stage can be written"
done

# --- a picture
generate() { # arguments ...
    entrypoint='' start generate "$shared" 384m "$orchestrator_image" generate "$@"
}
end_of_generate() { # seconds
    wait_until "$1" "the end of klein generate" is_stopped generate
    expect "the exit code of klein generate" "$(exit_code generate)" 0
    "$engine" rm "$run-generate" >/dev/null
}
began=$(seconds)
generate "a large red heart on a yellow background" --seed 7 -o /out/heart.png
end_of_generate 120
inside vae-decoder python3 -c '
from PIL import Image
picture = Image.open("/out/heart.png").convert("RGB")
assert picture.size == (128, 128), picture.size
center, corner = picture.getpixel((64, 64)), picture.getpixel((6, 6))
assert center[0] > 150 and center[1] < 110, f"the center is {center}, not red"
assert corner[0] > 150 and corner[1] > 130 and corner[2] < 120, f"the corner is {corner}, not yellow"
' || fail "the picture is not a red heart on yellow"
[ -z "$picture" ] || cp heart.png "$picture"
echo "smoke.sh: a red heart on yellow after $(($(seconds) - began)) s"

# --- process 1 reaps orphans; a server that is process 1 itself does not, so the check can fail
zombies_after_orphans() { # name: leaves five orphans, and prints how many of them are still there, dead, 3 s later
    inside "$1" sh -c 'for i in 1 2 3 4 5; do (setsid sleep 0.2 &) ; done; sleep 3
        grep -l "^State:[[:space:]]*Z" /proc/[0-9]*/status 2>/dev/null | wc -l'
}
for stage in text-encoder denoiser vae-decoder orchestrator; do
    expect "the number of zombies in $stage" "$(zombies_after_orphans $stage)" 0
done
entrypoint=klein start control none 384m "$orchestrator_image" serve orchestrator
wait_until 60 "readiness of the control" inside control python3 -m klein_services.cli.probe orchestrator
expect "the number of zombies without an init" "$(zombies_after_orphans control)" 5
echo "smoke.sh: no zombie is left; without dumb-init five are"

# --- SIGTERM during the imports, before the server handles it, ends the process at once
entrypoint='' start early none 1g "$stage_image" serve denoiser
"$engine" kill --signal TERM "$run-early" >/dev/null
wait_until 30 "the end of a starting stage" is_stopped early
code=$(exit_code early)
[ "$code" != 137 ] || fail "a starting stage had to be killed"

# --- SIGTERM under load: the pictures in progress are finished, then every process ends with 0
generate "a small blue star on a white background" --seed 7 --count 4 --steps 100 -o /out/star.png
denoises() {
    inside denoiser python3 -c '
import sys, urllib.request
page = urllib.request.urlopen("http://localhost:9465/metrics").read().decode()
sys.exit("klein_running_requests{stage=\"denoiser\"} 1.0" not in page)'
}
wait_until 60 "work of the denoiser" denoises
began=$(seconds)
for stage in orchestrator denoiser; do "$engine" kill --signal TERM "$run-$stage" >/dev/null; done
! is_stopped generate || fail "the request ended before the drain: nothing was drained"
end_of_generate 120
[ "$(find . -name 'star*.png' | wc -l)" = 4 ] || fail "the drain lost pictures: $(ls)"
# These two had to answer the request that was drained; text-encoder is last because the others use its network.
for stage in vae-decoder text-encoder; do "$engine" kill --signal TERM "$run-$stage" >/dev/null; done
for stage in orchestrator denoiser vae-decoder text-encoder; do
    wait_until 130 "the end of $stage" is_stopped $stage
    expect "the exit code of $stage after SIGTERM" "$(exit_code $stage)" 0
done
echo "smoke.sh: SIGTERM under load: four pictures finished, four processes ended with 0, $(($(seconds) - began)) s"
