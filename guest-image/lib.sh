# shellcheck shell=bash
# What the image builders (kernel, root, node) share: where built things are cached, under which key,
# and how a half-built or damaged one is never used. Sourced by bash scripts under `set -euo pipefail`.
#
#   artefact KIND KEY BUILD FILE...      print the directory with FILE..., building it if need be
#
#        present and whole? ──yes──► print it
#              │ no
#        lock KIND ─► look again ─► build in .tmp-* ─► manifest ─► rename ─► print it
#
# Progress goes to stderr, the directory is the only line on stdout.

# say TEXT...: one progress line, with the seconds since the script began.
say() { printf '%s [%3ds] %s\n' "${0##*/guest-image/}" "$SECONDS" "$*" >&2; }

# die TEXT...: an error that names the cause and what to do; ends the script with status 1.
die() {
    printf '%s: error: %s\n' "${0##*/guest-image/}" "$*" >&2
    exit 1
}

# cache_root: the directory of everything built or downloaded. Made if it is not there.
cache_root() {
    local dir=${MANDOLINE_CACHE:-${XDG_CACHE_HOME:-${HOME:?HOME, XDG_CACHE_HOME or MANDOLINE_CACHE must be set}/.cache}/mandoline}
    [[ $dir == /* ]] || die "the cache directory must be an absolute path: '$dir'"
    mkdir -p -- "$dir" || die "cannot make the cache directory '$dir'"
    printf '%s\n' "$dir"
}

# package_names FILE: the names in a `packages` file (one `name  # why` a line).
package_names() { sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' -- "$1"; }

# need_packages FILE: die with one command to run when a Debian package that FILE lists is missing.
need_packages() {
    local name missing=() status
    command -v dpkg-query >/dev/null || die "this builder needs Debian (dpkg-query was not found)"
    # shellcheck disable=SC2016 # dpkg-query expands it
    status=$(package_names "$1" | xargs dpkg-query -W -f '${db:Status-Status} ${Package}\n' 2>/dev/null || true)
    while read -r name; do
        grep -qxF "installed $name" <<<"$status" || missing+=("$name")
    done < <(package_names "$1")
    ((${#missing[@]} == 0)) ||
        die "missing Debian packages. As root: apt-get install -y --no-install-recommends ${missing[*]}"
}

# need_space DIR MIB WHAT: die early when DIR's file system lacks room for WHAT.
need_space() {
    local have
    have=$(($(stat -f -c '%a * %S' -- "$1") / 1048576))
    ((have >= $2)) || die "$3 needs $2 MiB in '$1', which has $have MiB free; set MANDOLINE_CACHE to a roomier place"
}

# hash_files FILE...: `sha256  name` lines with names stripped of their directories' prefix, for use in a key.
hash_files() {
    local file
    for file in "$@"; do
        printf '%s  %s\n' "$(sha256sum <"$file" | cut -d' ' -f1)" "${file##*/}"
    done
}

# hash_tree DIR [EXCLUDED-NAME...]: one sha256 over the names, modes and contents below DIR.
hash_tree() {
    local dir=$1 name not=()
    shift
    for name in "$@"; do not+=(-not -path "*/$name/*" -not -name "$name"); done
    (
        cd -- "$dir" || exit
        find . -type f "${not[@]}" -print0 | LC_ALL=C sort -z | xargs -0 -r sha256sum
    ) | sha256sum | cut -d' ' -f1
}

# key_of: a cache key, the sha256 of stdin: lines that name every input.
key_of() { sha256sum | cut -d' ' -f1; }

# manifest_files DIR: `name bytes sha256` for each file that DIR's manifest lists.
manifest_files() {
    sed -n 's/^    "\([^"]*\)": {"bytes": \([0-9]*\), "sha256": "\([0-9a-f]\{64\}\)"},\{0,1\}$/\1 \2 \3/p' -- "$1/manifest.json"
}

# manifest_digest DIR FILE: the sha256 that the manifest gives for FILE.
manifest_digest() { manifest_files "$1" | awk -v f="$2" '$1 == f { print $3 }'; }

# manifest_write DIR KIND KEY FILE...: DIR/manifest.json. Members that the builder adds (JSON lines such as
# `  "packages": {...}`, comma separated) come from DIR/manifest.extra, which is removed.
manifest_write() {
    local dir=$1 kind=$2 key=$3 file comma=,
    shift 3
    {
        printf '{\n  "kind": "%s",\n  "key": "%s",\n' "$kind" "$key"
        if [[ -s $dir/manifest.extra ]]; then
            cat -- "$dir/manifest.extra"
            printf ',\n'
        fi
        printf '  "files": {\n'
        for file in "$@"; do
            [[ $file == "${*: -1}" ]] && comma=
            printf '    "%s": {"bytes": %d, "sha256": "%s"}%s\n' "$file" "$(stat -c %s -- "$dir/$file")" \
                "$(sha256sum <"$dir/$file" | cut -d' ' -f1)" "$comma"
        done
        printf '  }\n}\n'
    } >"$dir/manifest.json"
    rm -f -- "$dir/manifest.extra"
}

# artefact_check DIR FILE...: 0 when every FILE is there and as the manifest says; else the reason on stdout and 1.
# Digests are computed again only when a file's inode, size or change time is not what it was when they last
# matched, so that looking at a 300 MB image that nobody touched costs nothing.
artefact_check() {
    local dir=$1 file name bytes digest listed stamp
    shift
    [[ -f $dir/manifest.json ]] || { echo "it has no manifest"; return 1; }
    listed=$(manifest_files "$dir")
    for file in "$@"; do
        read -r name bytes digest < <(awk -v f="$file" '$1 == f' <<<"$listed") || true
        [[ ${name:-} == "$file" ]] || { echo "its manifest does not list $file"; return 1; }
        [[ -f $dir/$file ]] || { echo "$file is gone"; return 1; }
        [[ $(stat -c %s -- "$dir/$file") == "$bytes" ]] || { echo "$file has the wrong size"; return 1; }
    done
    stamp=$(cd -- "$dir" && stat -c '%n %i %s %z' -- manifest.json "$@")
    [[ -f $dir/.verified && $(<"$dir/.verified") == "$stamp" ]] && return 0
    while read -r name bytes digest; do
        [[ $(sha256sum <"$dir/$name" | cut -d' ' -f1) == "$digest" ]] || { echo "$name has the wrong digest"; return 1; }
    done <<<"$listed"
    # A cache that this user may read but not write is fine: it is verified each time.
    printf '%s\n' "$stamp" 2>/dev/null >"$dir/.verified" || true
}

# artefact_prune KIND-DIR KEEP: forget things that were not used for a day, but keep the KEEP used last.
artefact_prune() {
    local dir
    find "$1" -mindepth 1 -maxdepth 1 -type d -not -name '.*' -printf '%T@ %p\n' | sort -rn | tail -n +$(($2 + 1)) |
        cut -d' ' -f2- | while read -r dir; do
        [[ -n $(find "$dir" -maxdepth 0 -mmin +1440) ]] && rm -rf -- "$dir"
    done || true
}

# artefact KIND KEY BUILD FILE...: the directory of the artefact, on stdout. BUILD is a function, called as
# `BUILD DIR`; it must leave every FILE in DIR, may leave manifest.extra, and talks on stderr only.
# Call it as a plain command: inside `if` or before `||` the shell would ignore errors in BUILD.
artefact() {
    local kind=$1 key=$2 build=$3 base dir tmp why status lock
    shift 3
    base=$(cache_root)/$kind
    dir=$base/$key
    mkdir -p -- "$base"
    if [[ -d $dir ]] && why=$(artefact_check "$dir" "$@"); then
        touch -c -- "$dir" 2>/dev/null || true
        printf '%s\n' "$dir"
        return
    fi
    exec {lock}>"$base/.lock" || die "cannot write in the cache '$base'"
    if ! flock -n "$lock"; then
        say "another builder of $kind is at work; waiting for it"
        flock "$lock"
    fi
    # Whoever made these is dead: a living builder would hold the lock.
    find "$base" -mindepth 1 -maxdepth 1 -name '.tmp-*' -print0 | while IFS= read -r -d '' tmp; do
        say "removing a half-built $kind left by an interrupted run"
        remove_tree "$tmp"
    done
    if [[ -d $dir ]]; then
        if why=$(artefact_check "$dir" "$@"); then
            exec {lock}>&-
            printf '%s\n' "$dir"
            return
        fi
        say "the cached $kind $dir is damaged: $why; building it again"
        remove_tree "$dir"
    fi
    tmp=$base/.tmp-$key.$$
    mkdir -- "$tmp"
    # shellcheck disable=SC2064 # the name as it is now
    trap "remove_tree '$tmp'" EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    set +e
    # The lock is not for grandchildren: one that outlives us must not keep it.
    (set -euo pipefail; "$build" "$tmp" {lock}>&-) >&2
    status=$?
    set -e
    ((status == 0)) || die "building $kind failed (status $status); nothing was kept"
    for why in "$@"; do
        [[ -s $tmp/$why ]] || die "building $kind made no $why"
    done
    manifest_write "$tmp" "$kind" "$key" "$@"
    sync -f "$tmp"
    mv -T -- "$tmp" "$dir"
    trap - EXIT INT TERM HUP
    artefact_prune "$base" 4
    exec {lock}>&-
    printf '%s\n' "$dir"
}

# remove_tree DIR: rm -rf that also manages directories without write permission (unpacked sources), and what other
# users of an ordinary user's namespace own (root trees of an interrupted build).
remove_tree() {
    [[ -e $1 ]] || return 0
    rm -rf -- "$1" 2>/dev/null && return
    chmod -R u+rwX -- "$1" 2>/dev/null || true
    rm -rf -- "$1" 2>/dev/null || unshare --user --map-auto --map-root-user -- rm -rf -- "$1"
}

# apt_index: apt's index is there; root fetches it where it is not (container images come without).
apt_index() {
    [[ -n $(find /var/lib/apt/lists -maxdepth 1 -name '*_Packages*' -print -quit 2>/dev/null) ]] && return
    (($(id -u) == 0)) || die "apt has no package index. As root: apt-get update"
    say "fetching apt's package index"
    apt-get -qq update >&2 || die "apt-get update failed (above)"
}

# candidate_version PACKAGE: the version that apt would install; die when there is none.
candidate_version() {
    local version
    apt_index
    version=$(LC_ALL=C apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: //p')
    [[ -n $version && $version != "(none)" ]] ||
        die "apt knows no package $1. As root: apt-get update (Debian 12 with its security archive is expected)"
    printf '%s\n' "$version"
}

# download_deb PACKAGE VERSION: the .deb's path in the cache, downloaded through the machine's own apt
# configuration (which checks its digest against the signed index). Needs no root.
download_deb() {
    local dir file tmp
    dir=$(cache_root)/download
    mkdir -p -- "$dir"
    file=$dir/${1}_${2//:/%3a}.deb
    if [[ ! -s $file ]]; then
        tmp=$(mktemp -d "$dir/.tmp-XXXXXX")
        say "downloading $1 $2"
        # As root apt would drop to a user who cannot write in our cache, and warn.
        if ! (cd "$tmp" && apt-get -qq -o APT::Sandbox::User=root download "$1=$2" >&2) ||
            ! mv -- "$tmp"/*.deb "$file"; then
            rm -rf -- "$tmp"
            die "could not download $1 $2. As root: apt-get update, then try again"
        fi
        rm -rf -- "$tmp"
    fi
    printf '%s\n' "$file"
}

# debian_sources SUITE: Debian's own archives for it, as this machine's apt is told to reach them: lines of sources.list.
debian_sources() {
    local codename=$1 sources
    # shellcheck disable=SC2016 # apt expands it
    sources=$(apt-get indextargets --format '$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)' 'Created-By: Packages' 2>/dev/null |
        awk -F'|' -v s="$codename" '$1 == "Debian" && ($2 == s || index($2, s "-") == 1) && $2 !~ /backports/ && $5 == "main" && !seen[$0]++ {
            # Passwords in addresses are for this machine, not for every sliver.
            sub(/:\/\/[^\/@]*@/, "://", $3); print "deb " $3 " " $4 " " $5 }')
    grep -q " $codename main" <<<"$sources" ||
        die "apt has no index of Debian $codename. As root: apt-get update, with Debian $codename (main) among the sources"
    printf '%s\n' "$sources"
}

# static_program PACKAGE BINARY: the path of one of our programs, built static and small, as sliver images want it.
static_program() {
    local repo cargo_home target=x86_64-unknown-linux-gnu built
    repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
    command -v cargo >/dev/null || die "cargo was not found: install Rust (rustup.rs)"
    cargo_home=${CARGO_HOME:-$HOME/.cargo}
    # --target keeps these flags away from build scripts and procedural macros; the prefixes keep this
    # machine's paths out of the binary, so that any checkout makes the same bytes.
    (cd "$repo" && RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static --remap-path-prefix=$repo=/mandoline --remap-path-prefix=$cargo_home=/cargo" \
        nice -n 5 cargo build --quiet --locked --profile agent --target "$target" -p "$1" >&2) ||
        die "$1 did not compile"
    built=${CARGO_TARGET_DIR:-$repo/target}/$target/agent/$2
    [[ $built == /* ]] || built=$repo/$built
    printf '%s\n' "$built"
}
