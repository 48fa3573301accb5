"""Networks on a Linux bridge: netlink, nftables, dnsmasq."""
