// Package resolved tells systemd-resolved, by its D-Bus interface org.freedesktop.resolve1, to ask one server at one network
// device for all names, and takes this back.
//
// Its questions to port 53 come to `viasocks up` in any case. Being told, it also forgets the answers from before, uses neither
// DNS over TLS nor DNSSEC, which an address that stands for a name cannot pass, and needs no server of another device. All that
// is told belongs to the device: when the device is deleted, systemd-resolved forgets it, also after a crash of ours.
//
// Where there is no system bus, or nothing called systemd-resolved on it, nothing happens and nothing is logged above debug
// level. Each exchange on the bus has a deadline.
package resolved
