// Package kernel changes the host's ip rules, kernel routes and nftables so that packets reach the TUN and nothing
// leaves past it, and undoes it.
//
// Closed takes both: rules and routes give programs the right source address and a quick error, but sockets that are
// bound to a device pass them (IPv4), and so does whoever sets a mark. The filter sees what really leaves, but can't lead
// it anywhere. New says in which order things are done, and Config what the exceptions are.
//
// Every change is written to a journal before it is made. What is ours is known without it, too: rules and routes by
// their protocol number, tables by their name and counters, the device by its name. Undo needs no daemon.
package kernel
