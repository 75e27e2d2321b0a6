# Installs the wheel of this start into /opt/mvm, whose dependencies are part of the image. Does nothing if it is there.
set -eu
cd /run/mvm-node
wanted=$(cat wheel.sha256)
if [ "$(cat /opt/mvm/installed.sha256 2>/dev/null)" != "$wanted" ]; then
    /opt/mvm/bin/python -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile \
        --force-reinstall ./mvm-*.whl
    echo "$wanted" >/opt/mvm/installed.sha256.new
    sync -f /opt/mvm
    mv /opt/mvm/installed.sha256.new /opt/mvm/installed.sha256
fi
