// Package resolved tells systemd-resolved, through its D-Bus interface org.freedesktop.resolve1, to ask one server at
// one network device for all names, and undoes this.
//
// Its questions to port 53 reach `viasocks up` in any case. The setting also makes it forget earlier answers, use
// neither DNS over TLS nor DNSSEC, which an address that stands for a name cannot pass, and need no server of another
// device. All settings belong to the device: when the device is deleted, even after a crash of viasocks,
// systemd-resolved forgets them.
//
// Without a system bus, or without systemd-resolved on it, nothing happens and nothing is logged above debug level.
// Each exchange on the bus has a deadline.
package resolved
