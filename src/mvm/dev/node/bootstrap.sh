# Sets the node up as any host is: mvm-hostd as a service. Does nothing if that was done with the wheel of this start.
# A node whose processor has no virtualization is a host for development only, and says so.
set -eu
done=/opt/mvm/bootstrapped.sha256
wanted=$(cat /run/mvm-node/wheel.sha256)
[ "$(cat "$done" 2>/dev/null)" != "$wanted" ] || exit 0
missing=15
code=0
mvm bootstrap || code=$?
[ "$code" -eq 0 ] || { [ "$code" -eq "$missing" ] && mvm bootstrap --development; }
echo "$wanted" >"$done.new"
mv "$done.new" "$done"
