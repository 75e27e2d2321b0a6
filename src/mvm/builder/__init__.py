"""Turns a flake into guest artifacts and keeps them as revisions.

Runs as: root today (HostNixBuilder, for development); as user mvm-build once a microVM does the building. Talks to: nix
and apt, through mvm.linux.process. May never: touch a tenant, an instance or a network device, nor import hostd.

    model         BuildRequest -> Artifacts, the Builder protocol
    flakes        where a flake is; staging it with the guest agent's source
    host          HostNixBuilder
    package_lock  the lock of a Debian-based flake; relock renews it from the archive
    apt           the machine's apt, privately; bootstrap, store_path: what nix starts from, and where it keeps it
    revisions     the content-addressed store of finished builds
"""
