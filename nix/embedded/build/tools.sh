# Unpacks the locked build tools with the bootstrap busybox. Ownership is dropped: nothing here is installed.
export PATH=
busybox=$builder
$busybox mkdir -p "$out"
for deb in $debs; do
  $busybox ar -p "$deb" data.tar.xz | $busybox xzcat | $busybox tar -x -o -C "$out" -f -
done
$busybox rm -rf "$out/usr/share" "$out/var" "$out/usr/lib/x86_64-linux-gnu/gconv"
for python in "$out"/usr/bin/python3.[0-9] "$out"/usr/bin/python3.[0-9][0-9]; do
  if [ -e "$python" ]; then $busybox ln -s "${python#"$out"/}" "$out/python"; fi
done
for loader in "$out"/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 "$out"/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2; do
  if [ -e "$loader" ]; then $busybox ln -s "${loader#"$out"/}" "$out/ld.so"; fi
done
