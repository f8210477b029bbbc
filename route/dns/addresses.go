package dns

import (
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// maxAddresses is how many records of one answer Addresses examines. Names with more are rare, and each program tries
// only the first few.
const maxAddresses = 256

// Addresses calls visit with each address that a resolver's answer gives for the name that was asked for, and with
// the time for which the answer is valid. The name is in lower case and without the dot at its end. If the message is
// not the answer to one question, or cannot be read to its end, the part before the fault counts. An address behind a
// CNAME belongs to the name that was asked for.
func Addresses(msg []byte, visit func(name string, a netip.Addr, ttl time.Duration)) {
	var p dnsmessage.Parser
	h, err := p.Start(msg)
	if err != nil || !h.Response || h.RCode != dnsmessage.RCodeSuccess {
		return
	}
	q, err := p.Question()
	if err != nil || q.Class != dnsmessage.ClassINET || p.SkipAllQuestions() != nil {
		return
	}
	name := strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))
	if name == "" {
		return
	}
	for range maxAddresses {
		rh, err := p.AnswerHeader()
		if err != nil {
			return
		}
		ttl := time.Duration(rh.TTL) * time.Second
		if rh.TTL > 1<<31-1 { // RFC 2181, section 8: a negative time counts as zero
			ttl = 0
		}
		switch {
		case rh.Class != dnsmessage.ClassINET:
			err = p.SkipAnswer()
		case rh.Type == dnsmessage.TypeA:
			var r dnsmessage.AResource
			if r, err = p.AResource(); err == nil {
				visit(name, netip.AddrFrom4(r.A), ttl)
			}
		case rh.Type == dnsmessage.TypeAAAA:
			var r dnsmessage.AAAAResource
			if r, err = p.AAAAResource(); err == nil {
				visit(name, netip.AddrFrom16(r.AAAA).Unmap(), ttl)
			}
		default:
			err = p.SkipAnswer()
		}
		if err != nil {
			return
		}
	}
}
