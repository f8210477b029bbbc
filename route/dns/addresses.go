package dns

import (
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// maxAddresses is how many records of one answer Addresses looks at. Names with more are rare, and each program tries the
// first few.
const maxAddresses = 256

// Addresses calls visit with each address that a resolver's answer gives for the name that was asked, and with the time
// for which the answer says that this holds. The name is in small letters and without the dot at its end. What is not the
// answer to one question, or cannot be read to its end, gives what stands before that. An address behind a CNAME is one
// of the name that was asked.
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
		if rh.TTL > 1<<31-1 { // RFC 2181 8: a negative time is none
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
