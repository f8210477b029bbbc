package config

import (
	"log/slog"
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/tun"
)

// DefaultUpstream is the name of what --proxy gives.
const DefaultUpstream = "proxy"

type timeDuration = time.Duration

// Upstream is a named proxy.
type Upstream struct {
	Name   string
	Server socks.Server
}

// Config is everything the user said, checked. It is not changed after Parse.
type Config struct {
	Command Command
	Program []string // run: the program and its arguments

	Upstreams []Upstream   // the one of --proxy first
	Default   string       // name of the upstream of flows that no rule matches; empty: they are refused
	Rules     []route.Rule // in the order given
	DNS       []netip.AddrPort

	ConnectTimeout, HandshakeTimeout time.Duration
	IdleTimeout, UDPTimeout          time.Duration
	MaxPending, MaxPendingPerDest    int
	MaxMappings                      int

	MTU          int
	Offload      tun.Mode
	KeepProxyEnv bool
	TUN          string
	Mark, Mask   uint32
	Table        int

	LogLevel slog.Level
	LogFile  string   // empty: standard error
	Warnings []string // to be logged once

	proxyAt      value // kept until finish
	passwordFile value
	logLevelSet  bool
}
