#!/bin/sh
# /init for a root file system on a disk: loads drivers, waits for the disk that root= names, and starts its first program.
# Kernel command-line words: root=/dev/NAME or LABEL=NAME or UUID=ID, rootfstype=, rw, init=PATH.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
# busybox finds itself through /proc, so that comes before its applets have names.
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null

# The value of the command-line word $1.
word() {
    case " $cmdline" in
        *" $1="*) value=${cmdline##*" $1="}; echo "${value%% *}" ;;
    esac
}

fail() {
    echo "trellis: $1"
    poweroff -f
}

load() {
    for bus in pci virtio scsi; do
        for alias in /sys/bus/$bus/devices/*/modalias; do
            [ -e "$alias" ] && modprobe -q "$(cat "$alias")" 2>/dev/null
        done
    done
}

# The device that $1 names.
device() {
    case $1 in
        LABEL=* | UUID=*) findfs "$1" 2>/dev/null ;;
        *) echo "$1" ;;
    esac
}

read -r cmdline < /proc/cmdline
load
modprobe -q sd_mod 2>/dev/null
exec < /dev/console > /dev/console 2>&1

root=$(word root)
tries=0
until disk=$(device "$root") && [ -b "$disk" ]; do
    tries=$((tries + 1))
    [ "$tries" -gt 100 ] && fail "there is no disk $root; give --append with another root="
    usleep 100000
    [ $((tries % 10)) = 0 ] && load
done
mode=ro
case " $cmdline " in *" rw "*) mode=rw ;; esac
type=$(word rootfstype)
modprobe -q "${type:-ext4}" 2>/dev/null
mkdir -p /new
mount -t "${type:-ext4}" -o $mode "$disk" /new || fail "cannot mount $disk as ${type:-ext4}; name its kind with rootfstype="
for directory in dev sys proc; do
    /bin/busybox mount --move "/$directory" "/new/$directory"
done
init=$(word init)
exec /bin/busybox switch_root /new "${init:-/sbin/init}"
