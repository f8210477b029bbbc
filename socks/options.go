package socks

import (
	"errors"
	"net/url"
)

// options are the words after the question mark of a URL.
type options struct {
	tor     bool
	isolate isolation
	uot     bool // datagrams travel by UDP over TCP
}

// isolation tells which dials may share a circuit of Tor.
type isolation uint8

const (
	isolateNone isolation = iota
	isolateDestination
	isolateProgram
)

var (
	errOption = errors.New(
		"behind the question mark stand tor, isolate=program|destination|none or udp=over-tcp, with & between",
	)
	errTor     = errors.New("tor and isolate need socks5")
	errIsolate = errors.New("isolate needs tor, and uses the user and the password itself")
)

// withOptions parses the query of a URL. No part of it appears in an error.
func (s Server) withOptions(query string) (Server, error) {
	if query == "" {
		return s, nil
	}
	words, err := url.ParseQuery(query)
	if err != nil {
		return Server{}, errOption
	}
	for name, values := range words {
		if len(values) != 1 {
			return Server{}, errOption
		}
		switch name + "=" + values[0] {
		case "tor=":
			s.options.tor = true
		case "udp=over-tcp":
			s.options.uot = true
		case "isolate=none":
		case "isolate=destination":
			s.options.isolate = isolateDestination
		case "isolate=program":
			s.options.isolate = isolateProgram
		default:
			return Server{}, errOption
		}
	}
	switch {
	case s.options.tor && s.proto != protoSOCKS5:
		return Server{}, errTor
	case s.options.isolate != isolateNone && (!s.options.tor || s.login != nil):
		return Server{}, errIsolate
	case s.options.uot && (s.options.tor || s.proto == protoSOCKS4):
		return Server{}, errUoT
	}
	return s, nil
}
