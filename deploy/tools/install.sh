#!/bin/sh
# Unpacks the programs that check and exercise deploy/ into .tools/ of this checkout. Needs no root: Debian's
# packages are downloaded and unpacked, never installed. A second run changes nothing.
#
#   KLEIN_DEBIAN_MIRROR  URI of a mirror of Debian; by default the one that apt uses on this machine
#   PYTHON               Python of .tools/venv; by default python3
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/deploy/tools
tools=$root/.tools
python=${PYTHON:-python3}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

# --- which files this run would make; equal to the last run's: nothing to do
wanted=$(cat "$here/install.sh" "$here/packages.txt" "$here/requirements.txt" | sha256sum | cut -d ' ' -f 1)
if [ "$(cat "$tools/.installed" 2>/dev/null)" = "$wanted" ]; then
    echo "install.sh: .tools is complete"
    exit 0
fi
rm -f "$tools/.installed"

# --- Debian packages
for command in apt-get apt-cache dpkg-deb ldd; do
    command -v "$command" >/dev/null ||
        fail "there is no $command here: Debian 12 or newer is needed, or put the programs of packages.txt on PATH"
done
[ -r "$keyring" ] || fail "$keyring is missing: apt-get install debian-archive-keyring"

mirror=${KLEIN_DEBIAN_MIRROR:-$(
    # shellcheck disable=SC2016  # apt expands these
    apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' | sed -n 's/^Debian //p' | head -n 1
)}
[ -n "$mirror" ] || fail "apt uses no mirror of Debian here: run apt-get update, or set KLEIN_DEBIAN_MIRROR"
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
[ -n "$release" ] || fail "/etc/os-release names no VERSION_CODENAME"

apt=$tools/apt
rm -rf "$tools/unpacked" "$tools/bin"
mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/deb" "$tools/unpacked" "$tools/bin"
: > "$apt/status"
for suite in "$release" sid; do
    echo "deb [signed-by=$keyring] $mirror $suite main"
done | sort -u > "$apt/sources.list"
grep " $release " "$apt/sources.list" > "$apt/machine.list"
# A state and a cache of its own: neither root nor the machine's package lists are touched.
cat > "$apt/apt.conf" << CONFIGURATION
Dir::State "$apt";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Sandbox::User "";
Acquire::Retries "3";
CONFIGURATION
export APT_CONFIG="$apt/apt.conf"
apt-get -qq update || fail "package lists of $mirror cannot be read: is KLEIN_DEBIAN_MIRROR right?"

unpack() { # package, suite
    rm -f "$apt"/deb/*.deb
    (cd "$apt/deb" && apt-get -qq download "$1/$2" 2>&1) || fail "package $1 of $2 cannot be downloaded from $mirror"
    dpkg-deb -x "$apt"/deb/*.deb "$tools/unpacked"
}

libraries() { # packages
    apt-cache -o Dir::Etc::sourcelist="$apt/machine.list" -o Dir::Cache::pkgcache="" -o Dir::Cache::srcpkgcache="" \
        depends --important "$@" | sed -n 's/^ *Depends: \(lib.*\)/\1/p' | grep -vE '^lib(c6|gcc-|stdc)' | sort -u
}

library_path=$tools/unpacked/usr/lib/$(dpkg --print-architecture | sed 's/amd64/x86_64/;s/arm64/aarch64/')-linux-gnu
missing_libraries() { # path of a binary
    LD_LIBRARY_PATH=$library_path ldd "$1" 2>/dev/null | sed -n 's/^\s*\(\S*\) => not found.*/\1/p'
}

grep -vE '^(#|$)' "$here/packages.txt" | while read -r suite package binary oldest data; do
    [ "$suite" = machine ] && suite=$release
    unpack "$package" "$suite"
    version=$(dpkg-deb -f "$apt"/deb/*.deb Version)
    dpkg --compare-versions "$version" ge "$oldest" || fail "$package $version of $suite is older than $oldest"
    for each in $data; do
        unpack "$each" "$suite"
    done
    program=$tools/unpacked/$binary
    # Libraries that this machine lacks come from its own release: those of the package, then theirs, and so on.
    needed=$package
    while [ -n "$(missing_libraries "$program")" ]; do
        # shellcheck disable=SC2086  # names of packages
        needed=$(libraries $needed)
        [ -n "$needed" ] || fail "$package needs libraries that $release lacks: $(missing_libraries "$program")"
        for library in $needed; do
            unpack "$library" "$release"
        done
    done
    name=$(basename "$binary")
    # shellcheck disable=SC2016  # the wrapper expands these
    printf '#!/bin/sh\nLD_LIBRARY_PATH="%s${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "%s" "$@"\n' \
        "$library_path" "$program" > "$tools/bin/$name"
    chmod +x "$tools/bin/$name"
    echo "install.sh: $name $version"
done
rm -rf "$apt"

# --- Python programs
command -v "$python" >/dev/null || fail "there is no $python here; set PYTHON"
[ -x "$tools/venv/bin/pip" ] || "$python" -m venv --clear "$tools/venv" ||
    fail "Python's venv module is needed: apt install python3-venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --requirement "$here/requirements.txt" || fail "requirements.txt cannot be installed"
"$tools/venv/bin/python" -m pip check --quiet || fail "requirements.txt misses a dependency"

# --- each program answers
for answer in "bin/prometheus --version" "bin/promtool --version" "bin/prometheus-alertmanager --version" \
    "bin/kubectl version --client" "bin/kustomize version" "bin/dnsmasq --version" \
    "venv/bin/kubernetes-validate --version" "venv/bin/checkov --version" "venv/bin/hadolint --version"; do
    # shellcheck disable=SC2086  # a command and its argument
    "$tools"/$answer > "$tools/answer" 2>&1 || fail "$answer fails: $(cat "$tools/answer")"
done
rm -f "$tools/answer"
echo "$wanted" > "$tools/.installed"
echo "install.sh: .tools is complete"
