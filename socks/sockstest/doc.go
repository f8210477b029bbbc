// Package sockstest is a SOCKS5 server that can misbehave on demand, for tests.
package sockstest
