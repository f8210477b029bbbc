package control

import (
	"time"

	"github.com/viasocks/viasocks/cmd/internal/publish"
)

// The states of a daemon.
const (
	Starting    = "starting"
	Waiting     = "waiting"     // the host is closed, and the proxy is not reachable yet
	Unconfirmed = "unconfirmed" // up, and will be undone unless it is confirmed
	Ready       = "ready"
	Leaving     = "leaving"  // another viasocks has taken over; it carries the flows that it had
	Impaired    = "impaired" // it was ready; the first warning tells what is wrong now
	Stopping    = "stopping"
)

// Published are the ports of a program that are reached from outside.
type Published struct {
	Ports []string `json:"ports"` // as --publish and --publish-unix name them
	publish.Stats
}

// Listening are the ports of a program to which peers behind the proxy can connect.
type Listening struct {
	Ports    []ListeningPort `json:"ports"`
	Accepted uint64          `json:"accepted"`
	Refused  uint64          `json:"refused"` // by the program
	Bogus    uint64          `json:"bogus"`   // with an impossible address of the peer

	Forwarded []ForwardedPort `json:"forwarded,omitempty"`
}

// ForwardedPort is a port of --forwarded-port.
type ForwardedPort struct {
	Addr  string `json:"address,omitempty"` // empty: the proxy's
	Port  uint16 `json:"port"`
	Proto string `json:"proto"`
	Inner uint16 `json:"inner,omitempty"` // the program's port that was told about it; 0: none
}

// ListeningPort is one port of the program.
type ListeningPort struct {
	Port     uint16 `json:"port"`
	Proto    string `json:"proto"`
	Upstream string `json:"upstream"`
	Outer    string `json:"outer,omitempty"`    // where peers connect; empty: nowhere
	Open     int    `json:"open"`               // connections of peers
	Why      string `json:"why,omitempty"`      // why the upstream does not listen
	Outer6   string `json:"outer6,omitempty"`   // where peers connect by IPv6
	Why6     string `json:"why6,omitempty"`     // why the upstream does not listen for IPv6
	Filtered bool   `json:"filtered,omitempty"` // UDP: only those reach it to whom the program has sent
}

// Status is the state of a daemon. Numbers that do not describe the present count since the start; bytes are payload.
type Status struct {
	Version   string     `json:"version"`
	PID       int        `json:"pid"`
	Mode      string     `json:"mode"`                  // "up", "run" or "attach"
	Program   string     `json:"program,omitempty"`     // run: the name of the program; attach: what names the namespace
	Name      string     `json:"name,omitempty"`        // of --name
	Inside    int        `json:"program_pid,omitempty"` // run: the process id of the program; attach: of our process inside
	Published *Published `json:"published,omitempty"`   // run: nil if no port is
	Listening *Listening `json:"listening,omitempty"`   // run: nil if peers cannot connect to any
	State     string     `json:"state"`
	Since     time.Time  `json:"since"`                // when it was started
	ReadyAt   *time.Time `json:"ready_at,omitempty"`   // when it became ready
	Before    int        `json:"before,omitempty"`     // flows of the viasocks from which the host was taken over
	Waiting   string     `json:"waiting,omitempty"`    // Waiting: why the proxy cannot be used yet
	ConfirmBy *time.Time `json:"confirm_by,omitempty"` // Unconfirmed: when everything will be undone
	Config    string     `json:"config,omitempty"`     // the configuration file
	Reloaded  *time.Time `json:"reloaded,omitempty"`   // when it was last reloaded successfully

	Upstreams []Upstream `json:"upstreams"`
	Rules     []Rule     `json:"rules"` // the last one covers everything else
	DNS       []string   `json:"dns"`

	TCP   TCP    `json:"tcp"`
	UDP   UDP    `json:"udp"`
	Names Names  `json:"names"`
	Sniff *Sniff `json:"sniff,omitempty"` // nil: no connection was held for its name
	Up    uint64 `json:"up_bytes"`        // program to proxy
	Down  uint64 `json:"down_bytes"`      // proxy to program

	Shards   Shards    `json:"shards"`
	Host     Host      `json:"host"`
	Dropped  []Counter `json:"dropped"` // what the data plane could not carry
	Warnings []string  `json:"warnings"`

	// Counters contains every number of the data plane, by the names of the metrics without their prefix.
	Counters map[string]int64 `json:"counters,omitempty"`
}

// noNulls replaces nil lists by empty ones, so that programs read [] and never null.
func (s *Status) noNulls() {
	for _, l := range []*[]string{&s.DNS, &s.Warnings, &s.Host.Steered, &s.Host.Kept, &s.Host.Excluded} {
		if *l == nil {
			*l = []string{}
		}
	}
	for _, l := range []*[]Counter{&s.Dropped, &s.Host.Refused} {
		if *l == nil {
			*l = []Counter{}
		}
	}
	if s.Upstreams == nil {
		s.Upstreams = []Upstream{}
	}
	if s.Rules == nil {
		s.Rules = []Rule{}
	}
}

// States of an upstream for TCP and for UDP. Nothing is known of an upstream's UDP before a program has sent a datagram
// through it: many servers have none.
const (
	UpstreamOK       = "ok"
	UpstreamDown     = "down"
	UpstreamNotTried = "not tried"
)

// Upstream is a group of servers, often of one, or direct, and its state.
type Upstream struct {
	Name      string           `json:"name"`
	URL       string           `json:"url"`                  // without its password; empty: direct
	Via       string           `json:"via,omitempty"`        // the upstream through which it is reached; empty: directly
	TCP       string           `json:"tcp"`                  // "ok" or "down"
	UDP       string           `json:"udp"`                  // "ok", "down" or "not tried"
	IPv6      string           `json:"ipv6,omitempty"`       // "yes" or "no", as connections have shown; empty: nothing is known
	NamesUDP  string           `json:"names_udp,omitempty"`  // the same for names in the headers of datagrams
	Granted   uint64           `json:"granted"`              // TCP connections
	Failed    uint64           `json:"failed"`               // TCP connections that failed through its own fault
	LatencyMS float64          `json:"latency_ms,omitempty"` // until a connection is granted, on average of the last ones
	Addresses []string         `json:"addresses,omitempty"`  // where our sockets may go for it
	Servers   []UpstreamServer `json:"servers,omitempty"`    // of a group; its URL tells how many
}

// UpstreamServer is one server of an upstream.
type UpstreamServer struct {
	URL          string `json:"url"`           // without its password
	State        string `json:"state"`         // "ok" or "down"
	Why          string `json:"why,omitempty"` // its last fault, if nothing has succeeded since
	Associations int    `json:"associations"`  // for UDP, now
}

// Rule is a rule and how often it decided, in TCP connections and datagrams.
type Rule struct {
	Rule   string `json:"rule"`
	Hits   uint64 `json:"hits"`
	Kernel bool   `json:"kernel,omitempty"` // the kernel applies it: what it lets out is not counted
}

// TCP counts connections.
type TCP struct {
	Now     int    `json:"now"`     // open, or waiting for the proxy's answer
	Pending int    `json:"pending"` // those that are waiting
	Total   uint64 `json:"total"`
	Refused uint64 `json:"refused"` // by a rule, by a limit, by the proxy or by a host behind it

	SecondTries  uint64 `json:"second_tries"`  // to names that the proxy could not reach, by an address of another family
	SecondOpened uint64 `json:"second_opened"` // of those: with success
}

// UDP counts mappings.
type UDP struct {
	Now          int    `json:"now"`
	Total        uint64 `json:"total"`
	Reassociated uint64 `json:"reassociated"` // associations that ended and were made again
	Refused      uint64 `json:"refused"`      // datagrams that were answered with an error
	GSO          string `json:"gso"`          // "on": datagrams go to the kernel in runs; "off"; empty before there is UDP
	GSOReason    string `json:"gso_reason"`   // why it is so, as text
}

// Names counts questions to port 53.
type Names struct {
	Asked    uint64 `json:"asked"`
	Answered uint64 `json:"answered"`       // or relayed to the server that was asked
	Failed   uint64 `json:"failed"`         // answered by SERVFAIL
	Own      uint64 `json:"own"`            // answered without a resolver
	Cached   uint64 `json:"cached"`         // answered from the cache
	Shared   uint64 `json:"shared"`         // answered with the answer to the same question, which was in progress
	Cache    Cache  `json:"cache"`          // the answers of resolvers
	Pool     *Pool  `json:"pool,omitempty"` // addresses that stand for names; nil: there is none
}

// Cache is the current content of the cache.
type Cache struct {
	Entries int `json:"entries"`
	Bytes   int `json:"bytes"`
}

// Sniff counts TCP connections that are held until their program has sent its first bytes (--sniff).
type Sniff struct {
	Asked uint64 `json:"asked"`
	Named uint64 `json:"named"` // those that had a name
	Full  uint64 `json:"full"`  // deferred to their next SYN, because too many were held
}

// Pool is the state of the fake addresses.
type Pool struct {
	Names   uint64 `json:"names"`   // names that have an address
	Size    uint64 `json:"size"`    // how many can have one
	Held    uint64 `json:"held"`    // those of Names that flows use
	Evicted uint64 `json:"evicted"` // names that lost their address to another
	Refused uint64 `json:"refused"` // names that got none
}

// Shards are the parts into which the flows are divided, by the programs' ports.
type Shards struct {
	Now        int    `json:"now"`         // 0: there is no data plane
	HandedOver uint64 `json:"handed_over"` // packets that arrived on another shard's queue of the TUN: the first of a flow
}

// Host is what was changed on the host. The lists are lines of text.
type Host struct {
	TUN      string    `json:"tun"`
	Table    int       `json:"table"`
	Mark     string    `json:"mark"`
	Steered  []string  `json:"steered"`
	Kept     []string  `json:"kept"`     // answered directly
	Excluded []string  `json:"excluded"` // directly, without the proxy
	Refused  []Counter `json:"refused"`  // packets that the filter blocked
	Resolved bool      `json:"resolved"` // systemd-resolved was told to ask viasocks for names
}

// Counter is a number with its name.
type Counter struct {
	Name    string `json:"name,omitempty"` // for programs, if there is one
	What    string `json:"what"`           // as text
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes,omitempty"`
}

// Flow is a TCP connection or a UDP mapping. For a mapping, Dst is the first destination.
type Flow struct {
	ID       uint64    `json:"id"`
	Proto    string    `json:"proto"`
	Src      string    `json:"src"`
	Dst      string    `json:"dst"`
	Host     string    `json:"host,omitempty"` // the name that was asked for, if known
	PID      int       `json:"pid,omitempty"`  // a process that has the socket open; 0: not found
	Exe      string    `json:"exe,omitempty"`  // its executable, if we may see it
	Rule     string    `json:"rule"`
	Upstream string    `json:"upstream"`
	State    string    `json:"state"`
	Start    time.Time `json:"start"`
	Up       uint64    `json:"up_bytes"`
	Down     uint64    `json:"down_bytes"`
}

// Flows is a list of flows, the busiest first. Total is the number of all flows, which exceeds the list if there was
// a limit.
type Flows struct {
	Total int    `json:"total"`
	Flows []Flow `json:"flows"`
}

// Limits of a list of flows.
const (
	DefaultFlows = 1000
	MaxFlows     = 20_000
)
