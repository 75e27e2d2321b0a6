# What the developer scripts share. Sourced by bash with the repository as working directory.

if [ -t 1 ]; then
    bold=$(printf '\033[1m') plain=$(printf '\033[0m')
else
    bold='' plain=''
fi

step() { # step TEXT...: what happens next, with the seconds since the script began
    printf '%s==> [%3ds] %s%s\n' "$bold" "$SECONDS" "$*" "$plain"
}

die() { # die LINE...: say what is wrong, and what to do, and end
    printf 'error: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '%s\n' "$@" >&2
    exit 1
}
