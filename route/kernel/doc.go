// Package kernel changes the host's kernel routes and ip rules so that packets reach the TUN, and undoes it.
//
// This is the plain form: rules and routes, taken away by Close. It keeps no journal and sets no packet filter, so a
// daemon that is killed leaves rules behind that send packets out as if it had never run (the next Steer removes
// them), and a socket bound to a device passes it by.
package kernel
