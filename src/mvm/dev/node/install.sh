# Installs the wheel of this start into /opt/mvm, whose dependencies are part of the image. Does nothing if it is there.
set -eu
cd /run/mvm-node
wanted=$(cat wheel.sha256)
if [ "$(cat /opt/mvm/installed.sha256 2>/dev/null)" != "$wanted" ]; then
    python3 -I -S install.py mvm-*.whl /opt/mvm
    for name in mvm mvm-hostd; do
        ln -sfn "/opt/mvm/bin/$name" "/usr/bin/$name"
    done
    echo "$wanted" >/opt/mvm/installed.sha256.new
    sync -f /opt/mvm
    mv /opt/mvm/installed.sha256.new /opt/mvm/installed.sha256
    # The daemon may not write below /opt, and would translate itself at each of its starts. Nobody waits for this.
    systemd-run --quiet --no-block --collect /opt/mvm/bin/python -m compileall -q /opt/mvm/lib/python3.*/site-packages/mvm
fi
