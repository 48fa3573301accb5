"""The files of the small guest that demo, tests and benchmark boot: busybox scripts, as text.

What the guest does, and what a test may rely on:

* On each interface `eth*` it asks for a lease. With it, it prints `VIRTFLEET <sha256>` of `NONCE MAC ADDRESS` (single
  spaces, no newline, MAC in lower case) where NONCE is `virtfleet.nonce=` of the kernel's command line, then
  `ADDRESS <interface> <address>`.
* It prints `READY <seconds>` (its uptime) when its console takes commands. A command is a line on the first serial
  console: `uptime` prints `UPTIME <seconds>` · `tick` prints that every second, `tock` ends it · `deaf` ignores the
  power button from then on · `crash` makes the kernel panic · `run COMMAND` runs a shell command, then prints
  `DONE <exit code>`.
* The power button powers it off, ctrl-alt-del reboots it.
"""

from __future__ import annotations

MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
    "button",
    "evdev",
)
"""Kernel modules in the order in which they need each other; one that the kernel has built in is left out."""

INITTAB = """\
::sysinit:/etc/rc
::respawn:-/sbin/console
::ctrlaltdel:/bin/reboot -f
::shutdown:/bin/sync
"""

START = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
while read -r module; do insmod "/lib/modules/$module.ko"; done < /lib/modules/order
acpid -l /dev/null
ip link set lo up
for path in /sys/class/net/eth*; do
    [ -e "$path" ] || continue
    ip link set "${path##*/}" up
    udhcpc -b -S -i "${path##*/}" -t 5 -T 1 -A 1 -s /etc/lease >/dev/null 2>&1 &
done
"""

LEASE = """\
#!/bin/sh
case "$1" in
bound|renew)
    before=$(cat "/run/$interface" 2>/dev/null)
    [ "$before" = "$ip" ] && exit 0
    ip address flush dev "$interface"
    ip address add "$ip/$mask" dev "$interface"
    [ -n "$router" ] && ip route add default via "${router%% *}" dev "$interface"
    : > /etc/resolv.conf
    for server in $dns; do echo "nameserver $server" >> /etc/resolv.conf; done
    echo "$ip" > "/run/$interface"
    read -r mac < "/sys/class/net/$interface/address"
    nonce=
    for word in $(cat /proc/cmdline); do
        case "$word" in virtfleet.nonce=*) nonce=${word#*=} ;; esac
    done
    sum=$(printf '%s %s %s' "$nonce" "$mac" "$ip" | sha256sum)
    printf 'VIRTFLEET %s\\nADDRESS %s %s\\n' "${sum%% *}" "$interface" "$ip" > /dev/console
    ;;
deconfig)
    rm -f "/run/$interface"
    ip address flush dev "$interface"
    ;;
esac
"""

CONSOLE = """\
#!/bin/sh
stty -echo
uptime() { read -r up idle < /proc/uptime; echo "$1 $up"; }
ticker=
uptime READY
while read -r command rest; do
    case "$command" in
    uptime) uptime UPTIME ;;
    tick)
        [ -n "$ticker" ] || { while :; do uptime UPTIME; sleep 1; done & ticker=$!; }
        ;;
    tock) [ -z "$ticker" ] || kill "$ticker"; ticker= ;;
    deaf) killall acpid; echo DEAF ;;
    crash) echo c > /proc/sysrq-trigger ;;
    run) eval "$rest"; echo "DONE $?" ;;
    '') ;;
    *) echo "UNKNOWN $command" ;;
    esac
done
"""

POWER_BUTTON = """\
#!/bin/sh
sync
poweroff -f
"""
