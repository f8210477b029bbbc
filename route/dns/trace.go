package dns

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// trace is what will be logged about a question. It exists only if lines at debug level are logged.
type trace struct {
	name  string // in the form of Judge, without control characters
	start time.Time
}

// How a question was answered, as logged.
const (
	howFake      = "fake"      // with an address that stands for a name, or with the name that an address stands for
	howOwn       = "own"       // by viasocks, without a resolver
	howCache     = "cache"     // from the cache
	howShared    = "shared"    // with the answer to the same question of another asker
	howResolver  = "resolver"  // by this resolver
	howRelayed   = "relayed"   // sent to the server that was asked; the answer is not seen
	howRefused   = "refused"   // because of the Judge
	howFailed    = "failed"    // no resolver answered, or no fake address was left
	howMalformed = "malformed" // with an error, or not at all
	howDropped   = "dropped"   // not at all: too many questions are in progress
)

// follow arranges that q is logged when it is answered, if that is wanted. It allocates nothing if not.
func (s *Server) follow(msg []byte, q *question) {
	if s.cfg.Log.Enabled(context.Background(), slog.LevelDebug) {
		q.trace = &trace{name: questionName(msg, q), start: time.Now()}
	}
}

// tell logs how q was answered. server is who answered it, if that is not viasocks; resp is the answer, or nil.
func (s *Server) tell(q *question, how, server string, resp []byte) {
	t := q.trace
	if t == nil {
		return
	}
	attrs := make([]slog.Attr, 0, 6)
	attrs = append(attrs, slog.String("name", t.name+"."), slog.String("type", typeName(q)), slog.String("how", how))
	if server != "" {
		attrs = append(attrs, slog.String("server", server))
	}
	if len(resp) >= headerLen {
		attrs = append(attrs, slog.String("rcode", rcodeText(binary.BigEndian.Uint16(resp[2:])&15)))
	}
	attrs = append(attrs, slog.Int64("us", time.Since(t.start).Microseconds()))
	s.cfg.Log.LogAttrs(context.Background(), slog.LevelDebug, "DNS question", attrs...)
}

// typeName returns the type of a question, or the operation if it is not a QUERY, as tools like dig write it.
func typeName(q *question) string {
	if !q.isQuery() {
		return fmt.Sprintf("opcode%d", q.flags&maskOpcode>>11)
	}
	switch q.qtype {
	case typeSVCB:
		return "SVCB"
	case typeHTTPS:
		return "HTTPS"
	case typeANY:
		return "ANY"
	}
	if s, ok := strings.CutPrefix(dnsmessage.Type(q.qtype).String(), "Type"); ok {
		return s
	}
	return fmt.Sprintf("TYPE%d", q.qtype) // RFC 3597, section 5
}

func rcodeText(rcode uint16) string {
	names := [...]string{
		"NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED", "YXDOMAIN", "YXRRSET", "NXRRSET", "NOTAUTH", "NOTZONE",
	}
	if int(rcode) < len(names) {
		return names[rcode]
	}
	return fmt.Sprintf("RCODE%d", rcode)
}
