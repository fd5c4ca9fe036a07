# shellcheck shell=bash
# What the tests of the image builders share. Sourced.
#
#   check WHAT COMMAND...      COMMAND must succeed
#   refused PATTERN COMMAND... COMMAND must fail, saying PATTERN on stderr
#   skip WHAT                  say that something was not looked at
#   finish                     the sum; status 1 when a check failed

checks=0
failures=0
scratch=

# scratch_dir: sets $scratch to a directory that is gone when the test ends.
scratch_dir() {
    scratch=$(mktemp -d)
    trap 'chmod -R u+rwX -- "$scratch"; rm -rf -- "$scratch"' EXIT
}

check() {
    local what=$1
    shift
    checks=$((checks + 1))
    if "$@"; then
        printf 'ok      %s\n' "$what"
    else
        failures=$((failures + 1))
        printf 'FAILED  %s (%s)\n' "$what" "$*"
    fi
}

skip() { printf 'skipped %s\n' "$1"; }

not() { ! "$@"; }

refused() {
    local pattern=$1 said
    shift
    ! said=$("$@" 2>&1 >/dev/null) && grep -q -- "$pattern" <<<"$said"
}

# readelf_misaligned FILE: true when a loaded segment's file offset and physical address differ within a page.
readelf_misaligned() {
    local offset address
    while read -r offset address; do
        (((offset & 4095) == (address & 4095))) || return 0
    done < <(readelf -lW "$1" | awk '$1 == "LOAD" { print $2, $4 }')
    return 1
}

finish() {
    printf '%s: %d checks, %d failed\n' "${0##*/guest-image/}" "$checks" "$failures"
    ((failures == 0))
}
