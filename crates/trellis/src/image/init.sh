#!/bin/sh
# /init of the Trellis initramfs: mounts, drivers for the devices that are there, and a shell on the console.
# Kernel command-line words:
#   trellis.run="CMD"   run CMD with sh, print its status, power off
#   trellis.init=PATH   exec PATH instead of the shell (with / as it is)
#   trellis.size=CxR    columns and rows of the terminal
#   trellis.quiet       no greeting
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux
# busybox finds itself through /proc, so that comes before its applets have names.
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /run /tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=755 run /run

# The value of the command-line word $1, quoted or not.
word() {
    case " $cmdline" in
        *" $1=\""*) value=${cmdline#*"$1=\""}; echo "${value%%\"*}" ;;
        *" $1="*) value=${cmdline#*"$1="}; echo "${value%% *}" ;;
    esac
}

# Loads the driver of every device on bus $1.
load_bus() {
    for alias in /sys/bus/$1/devices/*/modalias; do
        [ -e "$alias" ] && modprobe -q "$(cat "$alias")" 2>/dev/null
    done
}

read -r cmdline < /proc/cmdline
load_bus pci
load_bus virtio
# Drives behind a controller are found later; their drivers take them then.
[ -d /sys/bus/scsi ] && modprobe -q sd_mod 2>/dev/null && modprobe -q sr_mod 2>/dev/null
# The power button, and its events for programs.
load_bus acpi
modprobe -q evdev 2>/dev/null

# What udhcpc does with the address that it is given.
mkdir -p /etc/udhcpc
cat > /etc/udhcpc/default.script <<'END'
#!/bin/sh
case $1 in
    deconfig) ip link set "$interface" up; ip addr flush dev "$interface" ;;
    bound | renew)
        ip addr add "$ip/${mask:-24}" dev "$interface"
        [ -n "$router" ] && ip route replace default via "${router%% *}"
        for server in $dns; do echo "nameserver $server"; done > /etc/resolv.conf ;;
esac
END
chmod 755 /etc/udhcpc/default.script

# A console whose driver is a module (hvc0) exists only now.
exec < /dev/console > /dev/console 2>&1

size=$(word trellis.size)
[ -n "$size" ] && stty cols "${size%x*}" rows "${size#*x}"

init=$(word trellis.init)
[ -n "$init" ] && exec "$init"

[ -e /dev/input/event0 ] && acpid -l /dev/null -p /run/acpid.pid

run=$(word trellis.run)
if [ -n "$run" ]; then
    sh -c "$run"
    echo "trellis: '$run' ended with status $?"
    poweroff -f
fi

hostname trellis
case " $cmdline " in
    *" trellis.quiet "*) ;;
    *)
        echo
        echo "Welcome to Linux $(uname -r) ($(uname -m)) on Trellis: $(nproc) CPU(s), $(($(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo) / 1024)) MiB, up $(cut -d' ' -f1 /proc/uptime) s."
        echo "This is a busybox shell in an initramfs. Leave with: poweroff -f   (or exit)"
        echo
        ;;
esac
PS1='trellis:\w# ' setsid cttyhack sh
poweroff -f
