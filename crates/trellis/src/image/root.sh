#!/bin/sh
# /init for a root file system in a directory of the host: mounts the share trellis.root and starts what /trellis.conf names.
# /trellis.conf sets: overlay (1: nothing is written to the host), hostname, program, and the function extra.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
. /trellis.conf

fail() {
    echo "trellis: $1"
    poweroff -f
}

# Mounts the share $1 at $2, $3 is ro or rw.
share() {
    mount -t virtiofs -o "$3" "$1" "$2"
}

for bus in pci virtio acpi; do
    for alias in /sys/bus/$bus/devices/*/modalias; do
        [ -e "$alias" ] && modprobe -q "$(cat "$alias")" 2>/dev/null
    done
done
modprobe -q virtiofs 2>/dev/null
modprobe -q evdev 2>/dev/null
exec < /dev/console > /dev/console 2>&1

mkdir -p /new /lower /ram
if [ "$overlay" = 1 ]; then
    modprobe -q overlay 2>/dev/null
    share trellis.root /lower ro || fail "this kernel cannot mount a directory of the host (virtiofs)"
    mount -t tmpfs -o mode=755 ram /ram
    mkdir /ram/upper /ram/work
    mount -t overlay -o lowerdir=/lower,upperdir=/ram/upper,workdir=/ram/work root /new ||
        fail "this kernel has no overlay file system"
else
    share trellis.root /new rw || fail "this kernel cannot mount a directory of the host (virtiofs)"
fi
extra
[ -n "$hostname" ] && hostname "$hostname"
[ -d /new/run ] && mount -t tmpfs -o mode=755 run /new/run
for directory in dev sys proc; do
    mkdir -p "/new/$directory" 2>/dev/null
    /bin/busybox mount --move "/$directory" "/new/$directory"
done
# shellcheck disable=SC2086 # words of a command
exec /bin/busybox switch_root /new $program
