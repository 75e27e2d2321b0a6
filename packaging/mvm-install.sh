#!/bin/sh
# Installs a release of mvm on this host, or a newer one over it.
#
#   mvm-install.sh --key FILE --from DIRECTORY|https://ADDRESS
#                  [--firecracker DIRECTORY --firecracker-sums FILE] [--verify-only] [--root DIRECTORY]
#
#   --key FILE                the release's Ed25519 public key, PEM. Get it by another way than the release itself.
#   --from ...                a release, as packaging/release makes it
#   --firecracker DIRECTORY   take firecracker and jailer from here, both of one version; and, where FILE names them, that
#                             release's seccompiler-bin and list of system calls, of which the strict filter is made
#   --firecracker-sums FILE   their SHA-256, as sha256sum writes it; you vouch for it
#   --verify-only             check everything, install nothing
#   --root DIRECTORY          install below it instead of below /
#
# Order, and it is the point of this program: all files are copied into a private directory; the signature of SHA256SUMS
# is verified; then the SHA-256 of every file; then everything that could be in the way is looked at; only then is
# anything installed, from those verified copies. Any mismatch ends it with nothing changed.
#
# What it installs: /opt/mvm.d/<id>, a virtual environment, complete before /opt/mvm is switched to it in one step;
# /usr/bin/mvm and /usr/bin/mvm-hostd; /usr/lib/mvm/firecracker/<version>/, and `current` for it. It starts nothing: `mvm bootstrap` does.
# Interrupted, it leaves what was installed before; running it again goes on. Exit status: 0, or 1 with the reason.
set -eu
umask 022
export LC_ALL=C
# Not the caller's: what is first in it would check the signatures, as root.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin

key='' from='' root='' firecracker='' firecracker_sums='' verify_only=''
changed='' work='' building=''
MAX_SUMS=65536
MAX_FILE=536870912

say() { printf 'mvm-install: %s\n' "$*"; }

die() { # die PROBLEM [WHAT TO DO]
    printf 'mvm-install: %s\n' "$1" >&2
    [ -z "${2:-}" ] || printf '  next: %s\n' "$2" >&2
    [ -n "$changed" ] || printf '  Nothing was changed.\n' >&2
    exit 1
}

leave() {
    status=$?
    trap - EXIT
    [ -z "$building" ] || rm -rf -- "$building"
    [ -z "$work" ] || rm -rf -- "$work"
    exit "$status"
}

usage() {
    sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0"
}

value() { # value OPTION COUNT: the option must be followed by something
    [ "$2" -ge 2 ] || die "$1 needs a value" "See: $0 --help"
}

while [ $# -gt 0 ]; do
    case $1 in
    --key) value "$1" $#; key=$2; shift 2 ;;
    --from) value "$1" $#; from=$2; shift 2 ;;
    --root) value "$1" $#; root=$2; shift 2 ;;
    --firecracker) value "$1" $#; firecracker=$2; shift 2 ;;
    --firecracker-sums) value "$1" $#; firecracker_sums=$2; shift 2 ;;
    --verify-only) verify_only=yes; shift ;;
    --help | -h) usage; exit 0 ;;
    *) die "unknown argument: $1" "See: $0 --help" ;;
    esac
done

[ -n "$key" ] || die "--key is missing: without the signer's key nothing can be verified" "See: $0 --help"
[ -n "$from" ] || die "--from is missing: which release?" "See: $0 --help"
if [ -n "$firecracker" ] && [ -z "$firecracker_sums" ]; then
    die "--firecracker needs --firecracker-sums: what are the right binaries?" "See: $0 --help"
fi

need() { # need PROGRAM PACKAGE
    command -v "$1" >/dev/null || die "$1 is not installed" "apt-get install --no-install-recommends $2"
}
need openssl openssl
need sha256sum coreutils
need flock util-linux
need python3 python3
python3 -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "Python 3.11 or newer is needed"
python3 -I -c 'import ensurepip, venv' 2>/dev/null ||
    die "this Python cannot make virtual environments" "apt-get install --no-install-recommends python3-venv"
if [ -n "$root" ]; then
    [ -d "$root" ] || die "--root $root is not a directory"
    root=$(readlink -f -- "$root")
    [ "$root" != / ] || root=''
fi
[ -n "$root" ] || [ -n "$verify_only" ] || [ "$(id -u)" -eq 0 ] || die "installing for the whole host needs root" \
    "Run it as root, for example with sudo."

trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
work=$(mktemp -d)
chmod 0700 "$work"
mkdir "$work/release"

# 1. The key, and copies of the list and its signature.

openssl pkey -pubin -in "$key" -noout -text 2>/dev/null | head -n 1 | grep -q '^ED25519 Public-Key:' ||
    die "$key is not an Ed25519 public key in PEM form"
cp -- "$key" "$work/key.pem"

FETCH='
import sys, urllib.request
class Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, address):
        if not address.startswith("https://"):
            raise OSError("it leads away from https")
        return super().redirect_request(request, file, code, message, headers, address)
address, target, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
with urllib.request.build_opener(Redirects).open(address, timeout=60) as source, open(target, "xb") as out:
    left = limit
    while data := source.read(1 << 20):
        left -= len(data)
        if left < 0:
            raise OSError(f"it has more than {limit} bytes")
        out.write(data)
'

take() { # take NAME LIMIT: a private copy of one file of the release
    case $from in
    https://*)
        why=$(python3 -I -c "$FETCH" "${from%/}/$1" "$work/release/$1" "$2" 2>&1) ||
            die "$1 could not be fetched from $from: $(printf '%s' "$why" | tail -n 1)"
        ;;
    *)
        if [ -L "$from/$1" ] || [ ! -f "$from/$1" ]; then
            die "the release has no file $1" "A release is a directory that packaging/release made, all of it."
        fi
        [ "$(wc -c <"$from/$1")" -le "$2" ] || die "$1 is larger than any file of a release"
        cp -- "$from/$1" "$work/release/$1"
        ;;
    esac
}

case $from in
https://*) ;;
*://*) die "$from is not an https address or a directory" ;;
*) [ -d "$from" ] || die "$from is not a directory" ;;
esac
take SHA256SUMS $MAX_SUMS
take SHA256SUMS.sig 64

# 2. The signature: before it holds, not a word of the list is believed.

[ "$(wc -c <"$work/release/SHA256SUMS.sig")" -eq 64 ] || die "SHA256SUMS.sig is not an Ed25519 signature"
openssl pkeyutl -verify -pubin -inkey "$work/key.pem" -rawin -in "$work/release/SHA256SUMS" \
    -sigfile "$work/release/SHA256SUMS.sig" >/dev/null 2>&1 ||
    die "the signature of SHA256SUMS is not by $key: this is not the release that the key's owner made" \
        "Get the release again. If that does not help, ask whom you have the key from."

# 3. Every file.

[ -s "$work/release/SHA256SUMS" ] || die "SHA256SUMS is empty"
if grep -Evqx '[0-9a-f]{64}  [A-Za-z0-9][A-Za-z0-9._+-]{0,199}' "$work/release/SHA256SUMS"; then
    die "SHA256SUMS has a line that is not a hash and a plain file name"
fi
cut -c67- "$work/release/SHA256SUMS" >"$work/names"
[ -z "$(sort "$work/names" | uniq -d)" ] || die "SHA256SUMS names a file twice"
if grep -qx 'SHA256SUMS.*' "$work/names"; then
    die "SHA256SUMS names itself"
fi
case $from in
https://*) ;;
*)
    for path in "$from"/* "$from"/.[!.]* "$from"/..?*; do
        name=${path##*/}
        if [ ! -e "$path" ] && [ ! -L "$path" ]; then
            continue # a pattern that matched nothing
        fi
        [ "$name" = SHA256SUMS ] || [ "$name" = SHA256SUMS.sig ] || grep -Fqx -e "$name" "$work/names" ||
            die "the release has a file that nobody signed: $name" "Get the release again."
    done
    ;;
esac
while read -r name; do
    take "$name" $MAX_FILE </dev/null
done <"$work/names"
bad=$(cd "$work/release" && sha256sum --check --strict --quiet SHA256SUMS 2>/dev/null) ||
    die "not what was signed: $(printf '%s' "$bad" | sed 's/: FAILED.*//' | tr '\n' ' ')" "Get the release again."
[ -f "$work/release/requirements.lock" ] || die "the release has no requirements.lock"
set -- "$work/release"/mvm-*.whl
[ $# -eq 1 ] && [ -f "$1" ] || die "the release has not exactly one wheel of mvm"
wheel=$1
version=${wheel##*/mvm-}
version=${version%%-*}
id=$(sha256sum "$work/release/SHA256SUMS" | cut -c1-16)
# When it was made, which is its commit's time: packaging/release gives that to everything in the wheel.
made=$(python3 -I -c 'import sys, zipfile
print("%04d-%02d-%02d %02d:%02d:%02d" % max(i.date_time for i in zipfile.ZipFile(sys.argv[1]).infolist()))' \
    "$wheel" 2>/dev/null) || die "$(basename "$wheel") is not a wheel"
say "verified: mvm $version, $(wc -l <"$work/names") files, signed by $key"

# 4. Firecracker, by the operator's own list. Nothing of it is executed before its hash was right.

fc_version='' fc_names=''
fc_find() { # fc_find NAME [ENDING]: the one file of that name, or of the form its releases use; nothing if there is none
    found=''
    for path in "$firecracker/$1${2:-}" "$firecracker/$1"-v*-"$(uname -m)${2:-}"; do
        if [ -f "$path" ] && [ ! -L "$path" ]; then
            [ -z "$found" ] || die "$firecracker has more than one $1"
            found=$path
        fi
    done
    printf '%s' "$found"
}
fc_take() { # fc_take NAME [ENDING]: a private copy that the operator vouches for
    path=$(fc_find "$@") || exit 1
    [ -n "$path" ] || die "$firecracker has no $1"
    copy=$work/fc/$1${2:-}
    cp -- "$path" "$copy"
    sum=$(sha256sum <"$copy" | cut -c1-64)
    awk -v sum="$sum" -v name="${path##*/}" \
        '{ n = $2; sub(/^\*/, "", n); sub(/.*\//, "", n); if ($1 == sum && n == name) ok = 1 } END { exit !ok }' \
        "$firecracker_sums" ||
        die "$path is not what $firecracker_sums says" "Its SHA-256 is $sum."
    chmod 0755 "$copy"
    fc_names="$fc_names $1${2:-}"
}
fc_vouched() { # fc_vouched NAME [ENDING]: whether it is there and the operator's list names it
    path=$(fc_find "$@") || exit 1
    [ -n "$path" ] && awk -v name="${path##*/}" \
        '{ n = $2; sub(/^\*/, "", n); sub(/.*\//, "", n); if (n == name) ok = 1 } END { exit !ok }' "$firecracker_sums"
}
fc_version_of() { # what the program says it is
    "$work/fc/$1" --version 2>/dev/null </dev/null | sed -n "1s/^[A-Za-z-]* v\([0-9][0-9.]*\)\$/\1/p"
}
if [ -n "$firecracker" ]; then
    [ -f "$firecracker_sums" ] || die "$firecracker_sums is not a file"
    mkdir "$work/fc"
    fc_take firecracker
    fc_take jailer
    fc_version=$(fc_version_of firecracker)
    [ -n "$fc_version" ] || die "$firecracker/firecracker does not say its version"
    jailer_version=$(fc_version_of jailer)
    [ "$fc_version" = "$jailer_version" ] ||
        die "firecracker is $fc_version and jailer is ${jailer_version:-unknown}" "Take both from one release."
    # Both, or none: the list is nothing without its compiler.
    if fc_vouched seccomp-filter .json && fc_vouched seccompiler-bin; then
        fc_take seccomp-filter .json
        case ${path##*/} in
        seccomp-filter.json | seccomp-filter-v"$fc_version"-*) ;;
        *) die "$path is not of Firecracker $fc_version" "Take all of it from one release." ;;
        esac
        fc_take seccompiler-bin
        compiler_version=$(fc_version_of seccompiler-bin)
        [ "$fc_version" = "$compiler_version" ] ||
            die "firecracker is $fc_version and seccompiler-bin is ${compiler_version:-unknown}" "Take both from one release."
        chmod 0644 "$work/fc/seccomp-filter.json"
    fi
    fc_place=$root/usr/lib/mvm/firecracker/$fc_version
    for name in $fc_names; do
        if [ -e "$fc_place/$name" ] && ! cmp -s "$work/fc/$name" "$fc_place/$name"; then
            die "$fc_place/$name is another one of the same version" "If it is not used any more: rm -r $fc_place"
        fi
    done
    say "verified: Firecracker $fc_version:$fc_names"
fi

# 5. What could be in the way.

opt=$root/opt
place=$opt/mvm.d/$id
if [ -e "$opt/mvm" ] && [ ! -L "$opt/mvm" ]; then
    die "$opt/mvm is not a link of this program's" "See what it is; then: mv $opt/mvm $opt/mvm.old"
fi
for name in mvm mvm-hostd; do
    link=$root/usr/bin/$name
    if { [ -e "$link" ] || [ -L "$link" ]; } && [ "$(readlink -- "$link" || true)" != "../../opt/mvm/bin/$name" ]; then
        die "$link is not a link of this program's" "See what it is; then: rm $link"
    fi
done
# A signature says who made a release, not that it is the newest: whoever can serve an old one can serve its flaws.
there=$(cat "$opt/mvm/.complete" 2>/dev/null || true) # empty, or: VERSION DATE TIME
if [ -n "$there" ] && [ "$there" != "$version $made" ]; then
    say "mvm ${there%% *} is installed, made ${there#* }; this is mvm $version, made $made"
    first=$(printf '%s\n' "${there#* }" "$made" | sort | head -n 1)
    [ "$first" != "$made" ] || printf 'mvm-install: WARNING: this release is older than what is installed\n' >&2
fi
if [ -n "$verify_only" ]; then
    say "installed nothing, as asked"
    exit 0
fi

# 6. Install, from the copies.

mkdir -p "$opt/mvm.d" "$root/usr/bin"
exec 9>"$opt/mvm.d/.lock"
flock -n 9 || die "another mvm-install is under way"
changed=yes
for other in "$opt/mvm.d"/*; do # what an interrupted one left
    [ ! -d "$other" ] || [ -e "$other/.complete" ] || rm -rf -- "$other"
done

pip() {
    "$place/bin/python" -I -m pip --disable-pip-version-check --no-input "$@" 9>&- ||
        die "pip could not install the release" "Its message is above. What was installed before is as it was."
}
if [ -e "$place/.complete" ]; then
    say "mvm $version is there already: $place"
else
    say "installing mvm $version into $place"
    building=$place
    python3 -I -m venv "$place" 9>&-
    set -- --quiet --no-deps --require-hashes --only-binary :all: --requirement "$work/release/requirements.lock"
    if [ "$(grep -c '\.whl$' "$work/names")" -gt 1 ]; then
        pip install "$@" --no-index --find-links "$work/release"
    else
        # From the package index that this host's pip uses; by hash, so it does not matter which.
        pip install "$@"
    fi
    pip install --quiet --no-deps --no-index "$wheel"
    pip check >/dev/null
    said=$("$place/bin/mvm" --version 9>&-) || die "the installed mvm does not run"
    [ "$said" = "mvm $version" ] || die "the installed mvm says that it is $said"
    sync -f "$place"
    printf '%s\n' "$version $made" >"$place/.complete"
    sync -f "$place"
    building=''
fi

switch() { # switch TARGET LINK: in one step, whatever was there
    ln -sfn -- "$1" "$2.new"
    mv -T -- "$2.new" "$2"
}
fc_lacks() { # whether one of the files is not there yet
    for name in $fc_names; do
        [ -e "$fc_place/$name" ] || return 0
    done
    return 1
}
if [ -n "$fc_version" ] && fc_lacks; then
    mkdir -p "${fc_place%/*}"
    new=$(mktemp -d "${fc_place%/*}/.new-XXXXXX")
    building=$new
    chmod 0755 "$new"
    for name in $fc_names; do
        cp -p -- "$work/fc/$name" "$new/"
    done
    sync -f "$new"
    if [ -d "$fc_place" ]; then # of an installation without all of them; what is there is the same, as was seen above
        for name in $fc_names; do
            [ -e "$fc_place/$name" ] || mv -- "$new/$name" "$fc_place/$name"
        done
        rm -r -- "$new"
        sync -f "$fc_place"
    else
        mv -T -- "$new" "$fc_place"
    fi
    building=''
    say "installed $fc_place"
fi
[ -z "$fc_version" ] || switch "$fc_version" "${fc_place%/*}/current"

# Which one was there before is written down: run again, this program would not find it in the link any more.
before=$(readlink -- "$opt/mvm" || true)
if [ -n "$before" ] && [ "$before" != "mvm.d/$id" ]; then
    switch "${before#mvm.d/}" "$opt/mvm.d/.previous"
fi
previous=$(readlink -- "$opt/mvm.d/.previous" || true)
switch "mvm.d/$id" "$opt/mvm"
for name in mvm mvm-hostd; do
    switch "../../opt/mvm/bin/$name" "$root/usr/bin/$name"
done

# Kept: this one, the one before, and whatever a process still runs from: a VM's keeper outlives upgrades.
for other in "$opt/mvm.d"/*; do
    name=${other##*/}
    if [ ! -d "$other" ] || [ "$name" = "$id" ] || [ "$name" = "$previous" ]; then
        continue
    fi
    grep -Fqs -e "$other/" /proc/[0-9]*/maps || rm -rf -- "$other"
done
say "installed mvm $version"
say "next: mvm bootstrap"
