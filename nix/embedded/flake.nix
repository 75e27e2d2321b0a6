# Guest artifacts built by Nix from Debian packages alone: no nixpkgs, no network, no host program.
#
# How a build gets its bytes. `packages/packages.json` names every Debian package by version and sha256, and flake.lock
# pins that directory by narHash, so the sha256 of flake.lock stands for the whole package set. Each .deb is a
# fixed-output path addressed by its sha256. `mvm build` fetches what the store lacks with the machine's own apt (its
# mirror, its keys), checks the sha256 and adds it with `nix-store --add-fixed`; from there on nix finds the output
# valid and nothing is fetched inside a derivation. That is sturdier than running apt in a sandbox, which would need
# the host's apt, its libraries, keys and lists in there.
#
# What runs inside derivations: a static busybox (the one binary taken out of its package before the build, pinned by
# its own hash) unpacks libc, Python, e2fsprogs and lz4 from locked packages; these do the rest.
#
# By hand, without mvm (Nix before 2.26 cannot fetch a locked relative input, so put it in the store first):
#   nix store add-path --name source packages && nix build path:$PWD#tenant-rootfs-minimal
# which needs the packages in the store and the guest agent in ./guest; `mvm build` arranges both.
{
  description = "mvm guest artifacts from Debian packages";

  inputs.packages = {
    url = "path:./packages";
    flake = false;
  };

  outputs = { self, packages }:
    let
      system = "x86_64-linux";
      lock = builtins.fromJSON (builtins.readFile "${packages}/packages.json");
      profiles = [ "baseline" "minimal" "python" ];

      # The guest agent's source: staged next to this file by the builder, or in the repository that holds this flake.
      guest =
        if builtins.pathExists ./guest then ./guest
        else if builtins.pathExists ../../src/mvm/guest then ../../src/mvm/guest
        else throw "the guest agent's source is missing: build through mvm, or copy src/mvm/guest to ./guest";

      # Never fetched by nix. If the store lacks it, nix shows this URL in its error, hence its wording.
      deb = name:
        let p = lock.packages.${name}; in
        derivation {
          inherit system;
          name = p.file;
          builder = "builtin:fetchurl";
          url = "apt-package-not-in-store-run-mvm-build://${name}/${p.version}";
          outputHashMode = "flat";
          outputHashAlgo = "sha256";
          outputHash = p.sha256;
          preferLocalBuild = true;
        };
      debs = set: map deb lock.sets.${set};

      bootstrap = derivation {
        inherit system;
        name = "bootstrap-busybox";
        builder = "builtin:fetchurl";
        url = "busybox-not-in-store-run-mvm-build://bootstrap";
        outputHashMode = "recursive";
        outputHashAlgo = "sha256";
        outputHash = lock.bootstrap.nar_sha256;
        preferLocalBuild = true;
      };

      tools = derivation {
        inherit system;
        name = "mvm-build-tools";
        builder = "${bootstrap}/bin/busybox";
        args = [ "sh" "-eu" ./build/tools.sh ];
        debs = debs "tools";
      };

      # Python from the tools, started through the tools' own dynamic loader.
      python = name: args: attrs: derivation ({
        inherit system name tools;
        builder = "${tools}/ld.so";
        args = [
          "--library-path" "${tools}/lib/x86_64-linux-gnu:${tools}/usr/lib/x86_64-linux-gnu"
          "${tools}/python" "-B" "-S" "-s"
        ] ++ args;
        PYTHONHOME = "${tools}/usr";
        PYTHONHASHSEED = "0";
        SOURCE_DATE_EPOCH = "0";
        LC_ALL = "C.UTF-8";
      } // attrs);

      kernel = python "tenant-kernel" [ "${./build}/kernel.py" ] {
        debs = debs "kernel";
        inherit bootstrap;
        init = ./init/initrd-init;
      };

      rootfs = profile: python "tenant-rootfs-${profile}" [ "${./build}/rootfs.py" ] {
        inherit profile guest;
        debs = debs profile;
        init = ./init;
        policy = ./profiles.json;
      };

      # Valid as it stands; run time overlays machine-config, drives, network interfaces, vsock, logger and metrics.
      fcBase = profile: python "tenant-fc-base-${profile}" [ "${./build}/fc_base.py" ] {
        inherit kernel profile;
        policy = ./profiles.json;
      };

      perProfile = profile: [
        { name = "tenant-rootfs-${profile}"; value = rootfs profile; }
        { name = "tenant-kernel-${profile}"; value = kernel; }
        { name = "tenant-fc-base-${profile}"; value = fcBase profile; }
      ];
    in
    {
      packages.${system} = builtins.listToAttrs (builtins.concatLists (map perProfile profiles)) // {
        tenant-rootfs = rootfs "minimal";
        tenant-kernel = kernel;
        tenant-fc-base = fcBase "minimal";
      };
    };
}
