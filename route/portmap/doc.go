// Package portmap answers programs that ask their gateway for a port: NAT-PMP (RFC 6886), PCP (RFC 6887)
// and UPnP (InternetGatewayDevice:1). It parses requests and makes answers, and opens no socket; a Backend makes the ports.
package portmap
