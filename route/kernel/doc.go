// Package kernel changes the host's ip rules, kernel routes and nftables so that packets reach the TUN and nothing
// leaves past it, and undoes these changes.
//
// Both routes and a filter are needed. Rules and routes give programs the right source address and a quick error, but
// sockets bound to a device bypass them (IPv4), and so do programs that set a mark. The filter sees what really
// leaves, but cannot redirect it. Host describes the order of the steps, and Config the exceptions.
//
// Every change is written to a journal before it is made. Our changes are also recognized without it: rules and
// routes by their protocol number, tables by their name and counters, the device by its name. Undo needs no daemon.
package kernel
