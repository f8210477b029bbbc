package conform

import (
	"fmt"
	"time"
)

// Kind tells how a server answered a request.
type Kind string

// The kinds of an Answer.
const (
	Granted   Kind = "granted"
	Refused   Kind = "refused"   // with a reply; Answer.Code is its REP
	Closed    Kind = "closed"    // FIN instead of a reply
	Reset     Kind = "reset"     // RST instead of a reply
	Silence   Kind = "silence"   // no reply within the limit
	Malformed Kind = "malformed" // bytes that are not an answer of this version of SOCKS
	NoLogin   Kind = "no login"  // no offered method is accepted, or user and password are refused
	Failed    Kind = "failed"    // the probe could not ask; Answer.Error tells why
	NotAsked  Kind = ""          // the far end has no such target
)

// Answer is a server's answer to one request.
type Answer struct {
	Kind  Kind   `json:"kind"`
	Code  int    `json:"code,omitempty"`  // REP of RFC 1928, or CD of SOCKS4
	Short bool   `json:"short,omitempty"` // the refusal had fewer bytes than RFC 1928 requires
	After int64  `json:"after_ms"`        // milliseconds from the request to the answer
	Bound string `json:"bound,omitempty"` // BND.ADDR and BND.PORT
	Error string `json:"error,omitempty"` // what the probe saw, as text
	Early bool   `json:"early,omitempty"` // granted before dialling: the target was not there
	Works bool   `json:"works,omitempty"` // granted, and bytes went in both directions
	First bool   `json:"first,omitempty"` // the first bytes of the target arrived
}

// String returns a short form: "granted", "5", "FIN", "5 in 2 bytes".
func (a Answer) String() string {
	s := string(a.Kind)
	switch a.Kind {
	case NotAsked:
		return "not asked"
	case Granted:
		if a.Early {
			return "granted early"
		}
	case Refused:
		s = fmt.Sprint(a.Code)
		if a.Short {
			s += " (short)"
		}
	case Closed:
		return "FIN"
	case Reset:
		return "RST"
	}
	return s
}

// Passage tells what happened to an event (FIN or RST of one side) on its way through the server.
type Passage string

// The passages of a FIN and of a RST.
const (
	Passed    Passage = "passed"
	CutOff    Passage = "cut off" // FIN: the other direction ended as well, and bytes were lost
	BecameFIN Passage = "became FIN"
	Lost      Passage = "lost" // the other side saw nothing within the limit
	Unknown   Passage = "unknown"
)

// BindReport describes BIND.
type BindReport struct {
	First  Answer `json:"first"`          // the reply with the address where the server listens
	Second Answer `json:"second"`         // the reply once the peer has connected
	Peer   bool   `json:"peer,omitempty"` // the second reply names the peer's address and port
}

// NAT is a behaviour as in RFC 4787, sections 4.1 and 5.
type NAT string

// The values of NAT.
const (
	EndpointIndependent NAT = "endpoint-independent"
	AddressDependent    NAT = "address-dependent"
	PortDependent       NAT = "address- and port-dependent"
	UnknownNAT          NAT = "unknown"
)

// Fate is what an association does after a datagram that cannot be sent.
type Fate string

// The values of Fate.
const (
	Survives Fate = "survives"
	NewPort  Fate = "new port" // continues, seen from the far end at another endpoint
	Ended    Fate = "ends"     // the server closes the control connection
	Mute     Fate = "mute"     // the control connection stays, but nothing is carried any more
)

// Source is the sender in the header of an answer to a datagram that went to a name.
type Source string

// The values of Source.
const (
	SourceAddress Source = "address" // the address that the server found for the name
	SourceName    Source = "name"    // the name that was asked for
	SourceOther   Source = "other"   // another address, or another name
)

// UDPReport describes UDP ASSOCIATE.
type UDPReport struct {
	Associate   Answer `json:"associate"`
	Relay       string `json:"relay,omitempty"`    // where datagrams are sent
	Repaired    bool   `json:"repaired,omitempty"` // the reply named no usable host (zeros, a name), so the server's was used
	OtherFamily Answer `json:"other_family"`       // the reply if DST has zeros of the other family
	Works       bool   `json:"works"`              // an echo came back
	TrueSource  bool   `json:"true_source"`        // the headers of answers name their senders

	Mapping   NAT `json:"mapping,omitempty"`
	Filtering NAT `json:"filtering,omitempty"`

	LargestUp   int `json:"largest_up,omitempty"` // bytes of payload that arrive whole
	LargestDown int `json:"largest_down,omitempty"`
	CutUp       int `json:"cut_up,omitempty"` // larger ones arrive cut to this length; 0: they do not arrive
	CutDown     int `json:"cut_down,omitempty"`

	Names       bool   `json:"names"`                 // a name in the header works
	NameSource  Source `json:"name_source,omitempty"` // in the header of the answer to it
	IPv6        bool   `json:"ipv6"`
	EndsWithTCP bool   `json:"ends_with_tcp"` // nothing is carried after the client has closed the control connection

	After map[string]Fate `json:"after,omitempty"` // by what could not be sent
}

// Report is the result for one server. Zero fields were not tested.
type Report struct {
	Server string    `json:"server"` // its URL without credentials
	Time   time.Time `json:"time"`

	Reachable bool   `json:"reachable"`
	Error     string `json:"error,omitempty"` // why not

	// Methods are the server's choices when it is offered only "none", and when it is offered "none" and
	// user/password. -1: it gave no answer of SOCKS5.
	MethodOfNone int `json:"method_of_none"`
	MethodOfBoth int `json:"method_of_both"`

	Open        Answer `json:"open"` // TCP, IPv4
	Refused     Answer `json:"refused"`
	Unreachable Answer `json:"unreachable"`
	Silent      Answer `json:"silent"`
	IPv6        Answer `json:"ipv6"`
	Name        Answer `json:"name"`

	HalfCloseUp   Passage `json:"half_close_up,omitempty"` // the client's FIN
	HalfCloseDown Passage `json:"half_close_down,omitempty"`
	ResetUp       Passage `json:"reset_up,omitempty"` // the client's RST
	ResetDown     Passage `json:"reset_down,omitempty"`

	Bind BindReport `json:"bind"`
	UDP  UDPReport  `json:"udp"`

	SOCKS4  Answer `json:"socks4"`
	SOCKS4a Answer `json:"socks4a"`
}

// Truthful reports whether the server grants only what it has reached, and distinguishes a refused port from success
// by a reply.
func (r *Report) Truthful() bool {
	return r.Open.Works && r.Refused.Kind == Refused && r.Unreachable.Kind == Refused && !r.Silent.Early
}
