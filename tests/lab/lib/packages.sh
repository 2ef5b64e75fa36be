# shellcheck shell=bash
# Debian packages, fetched and unpacked into folders: no root, no chroot, and the system's own apt is left as it is.
#
# The mirror is the one that the system's apt uses; only the suites differ. Signatures are checked against the system's
# debian-archive-keyring.

LAB_KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# The suites that QEMU, its firmware, rust-src and the kernel's source come from. The host may be older.
LAB_RELEASE=trixie

# The configuration directory of an apt of our own. The system's drop-ins still apply (proxies, credentials), but not its
# hooks, which would clean the system's own cache.
packages_configure() {
    local apt=$1 mirror=$2 suites=$3
    mkdir -p "$apt"/{etc/apt/{preferences.d,sources.list.d},var/lib/{apt,dpkg},var/cache/apt/archives/partial}
    : >"$apt/var/lib/dpkg/status"
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' \
        "$mirror" "$suites" "$LAB_KEYRING" >"$apt/etc/apt/sources.list.d/lab.sources"
    cat >"$apt/apt.conf" <<CONF
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
#clear APT::Architectures;
APT::Architecture "$LAB_ARCHITECTURE";
APT::Architectures { "$LAB_ARCHITECTURE"; "arm64"; };
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::State "$apt/var/lib/apt";
Dir::State::status "$apt/var/lib/dpkg/status";
Dir::Cache "$apt/var/cache/apt";
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "$apt/etc/apt/sources.list.d";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "$apt/etc/apt/preferences.d";
CONF
    if [ "$(id -u)" = 0 ]; then
        # apt's own user could not enter the caller's cache folder.
        printf 'APT::Sandbox::User "root";\n' >>"$apt/apt.conf"
    fi
}

# Where the system gets Debian itself from.
packages_mirror() {
    local mirror
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)' 'Identifier: Packages' |
        awk -v release="$LAB_CODENAME" '$2 == release && $3 == "main" && ($4 == "Debian" || $4 ~ /^(\$.*)?$/) { print $1; exit }')
    if [ -z "$mirror" ]; then
        die "apt of this system has no source for Debian's suite '$LAB_CODENAME', component main:" \
            "a Debian machine is needed, or the packages named in tests/lab/README.md"
    fi
    printf '%s\n' "$mirror"
}

# An apt that sees SUITES, up to date; prints the path of its configuration, for APT_CONFIG.
packages_apt() {
    local suites=$1 apt
    apt=$LAB_CACHE/apt-$(printf '%s %s' "$LAB_ARCHITECTURE" "$suites" | tr ' ' '-')
    if [ ! -e "$LAB_RUN/${apt##*/}" ]; then
        [ -r "$LAB_KEYRING" ] || die "$LAB_KEYRING is missing: install debian-archive-keyring"
        local mirror
        mirror=$(packages_mirror)
        (
            flock 8
            packages_configure "$apt" "$mirror" "$suites"
            APT_CONFIG=$apt/apt.conf quietly apt-get update -o APT::Update::Error-Mode=any
        ) 8>"$LAB_CACHE/lock/${apt##*/}" ||
            die "the mirror that this system uses does not give the suites '$suites' (see above)." \
                "If the complaint is a missing key: apt-get install debian-archive-keyring"
        touch "$LAB_RUN/${apt##*/}"
    fi
    printf '%s\n' "$apt/apt.conf"
}

# packages_download SUITES PACKAGE...: into the current folder; each as apt-get takes it, NAME[:ARCHITECTURE][=VERSION|/SUITE].
packages_download() {
    local suites=$1 conf
    shift
    conf=$(packages_apt "$suites")
    APT_CONFIG=$conf quietly apt-get download "$@" || die "no package from '$suites': $*"
}

# packages_closure SUITES STATUS PACKAGE...: into the folder `archives`, with all they depend on that is not in the dpkg status
# file STATUS (/dev/null: nothing is installed).
packages_closure() {
    local suites=$1 status=$2 conf
    shift 2
    conf=$(packages_apt "$suites")
    mkdir -p archives/partial
    APT_CONFIG=$conf quietly apt-get install --yes --download-only -o Dir::State::status="$status" \
        -o Dir::Cache::archives="$PWD/archives" -o Debug::NoLocking=true "$@" ||
        die "no packages from '$suites': $*"
}

# packages_unpack ROOT: every package of the folder `archives`, which is removed.
packages_unpack() {
    local root=$1 package
    mkdir -p "$root"
    for package in archives/*.deb; do
        dpkg-deb --extract "$package" "$root"
    done
    rm -rf archives
}
