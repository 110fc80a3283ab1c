#!/bin/sh
# In the guest: one stressor after another, each for its share of the time. What the host reads begins with "soak: ".
# @MINUTES@, @WORKERS@ and @ONLY@ are put in by the host.
clock() { read -r up rest < /proc/uptime; echo "$up"; }
mkdir -p /dev/shm /root
mount -t tmpfs shm /dev/shm
ifconfig lo 127.0.0.1 up 2>/dev/null
cd /tmp

# Whole classes, and of the scheduler, os and interrupt classes what makes processes and signals.
names=
for class in cpu memory vm pipe; do
    names="$names $(stress-ng --class $class? --sequential 1 2>&1 | sed -n "s/^class '$class' stressors://p")"
done
names="$names fork vfork vforkmany clone daemon exec zombie pthread wait pidfd
    signal sigabrt sigchld sigfd sigfpe sigio signest sigpending sigpipe sigq sigrt sigsegv sigsuspend sigtrap sigxcpu sigxfsz
    kill itimer timer timerfd"
[ -n "@ONLY@" ] && names=$(echo "@ONLY@" | tr , ' ')
# bigheap, brk, stack, mmapmany and the like live on running out of memory; these would take the shell with them.
names=$(echo $names | tr ' ' '\n' | sort -u | grep -v -x -e oom-pipe -e '' | tr '\n' ' ')
set -- $names
echo "soak: version $(stress-ng --version 2>&1)"
echo "soak: plan $# $((@MINUTES@ * 60 / $#))"
now() { read -r up rest < /proc/uptime; echo "${up%.*}"; }
end=$(($(now) + @MINUTES@ * 60))
left=$#
for name in "$@"; do
    # What earlier ones took beyond their share is saved on those that follow.
    share=$(((end - $(now)) / left))
    [ $share -lt 2 ] && share=2
    left=$((left - 1))
    echo "soak: begin $name $(clock)"
    timeout -s KILL $((share * 4 + 60)) \
        stress-ng --$name @WORKERS@ --timeout ${share}s --verify --metrics-brief --oomable --temp-path /tmp 2>&1
    status=$?
    echo "soak: end $name $status $(clock)"
    rm -rf /tmp/stress-ng-* /dev/shm/*
done
echo "soak: done $(clock)"
