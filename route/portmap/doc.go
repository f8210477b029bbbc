// Package portmap answers programs that ask their gateway for a port: NAT-PMP (RFC 6886) and PCP (RFC 6887). It parses
// requests and makes answers, and does no I/O; a Backend makes the ports.
package portmap
