#!/bin/sh
# Finishes the tree of a distribution and makes a file system of it; run by mmdebstrap as its last hook, as the root of its
# namespace. $1: the tree. Standard input: the disk image, open for reading and writing. Environment:
#   TRELLIS_WORK   directory with modules.tar, sources.list, apt.conf, authorized_keys (each may be missing)
#   TRELLIS_NAME   host name
#   TRELLIS_LABEL  label of the file system
set -e
root=$1

# What mmdebstrap needed for itself, and what apt can fetch again.
rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap" "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/log/apt
mkdir -p "$root/var/lib/apt/lists/partial" "$root/var/log/apt"

# Packages come from where they came from here.
rm -f "$root"/etc/apt/sources.list.d/*
cat "$TRELLIS_WORK/sources.list" > "$root/etc/apt/sources.list"
if [ -s "$TRELLIS_WORK/apt.conf" ]; then cat "$TRELLIS_WORK/apt.conf" > "$root/etc/apt/apt.conf.d/80trellis"; fi

# The drivers of the kernel that the machine is booted with.
if [ -s "$TRELLIS_WORK/modules.tar" ]; then
    tar -C "$root" --no-same-owner -xf "$TRELLIS_WORK/modules.tar"
    for release in "$root"/usr/lib/modules/*; do chroot "$root" depmod "${release##*/}"; done
fi

# Names, file systems, network, console.
echo "$TRELLIS_NAME" > "$root/etc/hostname"
printf '127.0.0.1\tlocalhost\n127.0.1.1\t%s\n::1\tlocalhost ip6-localhost ip6-loopback\n' "$TRELLIS_NAME" > "$root/etc/hosts"
printf 'LABEL=%s / ext4 errors=remount-ro 0 1\n' "$TRELLIS_LABEL" > "$root/etc/fstab"
mkdir -p "$root/etc/systemd/network"
printf '[Match]\nName=en* eth*\n\n[Network]\nDHCP=yes\n' > "$root/etc/systemd/network/80-dhcp.network"
chroot "$root" systemctl -q enable systemd-networkd systemd-resolved serial-getty@ttyS0
# Nothing waits for a network that may not be there.
chroot "$root" systemctl -q disable systemd-networkd-wait-online
rm -f "$root/etc/resolv.conf"
ln -s ../run/systemd/resolve/resolv.conf "$root/etc/resolv.conf"

# root logs in on the console without a password; by ssh with a key alone, as sshd is set up.
chroot "$root" passwd -q -d root
if [ -s "$TRELLIS_WORK/authorized_keys" ]; then
    mkdir -p "$root/root/.ssh"
    cat "$TRELLIS_WORK/authorized_keys" > "$root/root/.ssh/authorized_keys"
    chmod 700 "$root/root/.ssh"
    chmod 600 "$root/root/.ssh/authorized_keys"
fi

# Each machine gets an identity and keys of its own when it first starts.
: > "$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root"/etc/ssh/ssh_host_*_key*
mkdir -p "$root/etc/systemd/system/ssh.service.d"
printf '[Service]\nExecStartPre=\nExecStartPre=/usr/bin/ssh-keygen -A\nExecStartPre=/usr/sbin/sshd -t\n' \
    > "$root/etc/systemd/system/ssh.service.d/keys.conf"

# The tree without what is mounted in it, where mounting is allowed.
tree=$root
view=$(mktemp -d)
if mount --bind "$root" "$view" 2>/dev/null; then tree=$view; fi
make() {
    mke2fs -q -F -t ext4 -L "$TRELLIS_LABEL" -m 1 -E "$1" -d "$tree" /proc/self/fd/0
}
# The file is all zeros; older versions of mke2fs cannot be told.
status=0
make assume_storage_prezeroed=1,nodiscard 2> "$view.log" || make nodiscard || status=$?
[ "$status" = 0 ] || cat "$view.log" >&2
if [ "$tree" = "$view" ]; then umount "$view"; fi
rmdir "$view"
rm -f "$view.log"
exit "$status"
