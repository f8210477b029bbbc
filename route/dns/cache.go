package dns

import (
	"encoding/binary"
	"sync"
	"time"
)

const (
	cacheEntries = 8192
	cacheBytes   = 8 << 20   // of messages and keys, plus entryCost for each
	entryCost    = 256       // bytes that an entry takes besides its message and its key
	maxCached    = 16 << 10  // a longer answer is not cached
	maxLife      = time.Hour // the longest time that an answer is cached, whatever its records say
	// of SERVFAIL: RFC 9520, section 3.2, requires at least 1 s, RFC 2308, section 7.1, at most 5 minutes
	failureLife  = 2 * time.Second
	keyLen       = 1 + maxName + 4 + 19 // without the name of a server
	flagAD       = 0x0020
	flagAA       = 0x0400
	flagDO       = 0x80 // in the third byte of the TTL of an OPT record (RFC 3225)
	optionECS    = 8    // RFC 7871
	optionCookie = 10   // RFC 7873
	optionAlive  = 11   // RFC 7828
	optionPad    = 12   // RFC 7830
	typeTKEY     = 249
	typeMAILA    = 254
)

// cache stores answers of resolvers until their TTL is over. Its entries and bytes are limited; the least recently
// used answer is dropped first. Its methods may be called from any goroutine.
type cache struct {
	entries, bytes int // limits

	mu    sync.Mutex
	byKey map[string]*cached
	ring  cached // its next is the most recently used entry
	held  int    // bytes
}

// cached is an answer without its OPT record. Its message never changes.
type cached struct {
	key           string
	msg           []byte
	stored, until time.Time
	prev, next    *cached
}

func newCache(entries, bytes int) *cache {
	c := &cache{entries: entries, bytes: bytes}
	c.clear()
	return c
}

// clear forgets everything.
func (c *cache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.byKey = make(map[string]*cached)
	c.ring.prev, c.ring.next = &c.ring, &c.ring
	c.held = 0
}

// appendKey appends what distinguishes questions: the server if it must be a certain one, the flags that affect the
// answer, the name in lower case, type and class. ok is false for a question whose answer is for this asker alone: an
// operation other than QUERY, a signed question, a transfer, or unknown EDNS options.
func appendKey(b, msg []byte, q *question, to Resolver) (_ []byte, ok bool) {
	if !q.isQuery() || q.end == 0 || q.ednsVersion != 0 || q.qtype == typeOPT || q.qtype >= typeTKEY && q.qtype <= typeMAILA {
		return b, false
	}
	alone := false
	_, whole := walkRecords(msg, func(section int, typ uint16, record []byte) bool {
		alone = section != additional || typ != typeOPT || !sharedOptions(record[optLen:])
		return !alone
	})
	if !whole || alone {
		return b, false
	}
	b = append(b, byte(q.flags&(flagCD|flagAD))|byte(q.flags&flagRD>>8)|q.do)
	for _, c := range msg[headerLen : q.end-4] {
		b = append(b, lower(c))
	}
	b = append(b, msg[q.end-4:q.end]...)
	return appendServer(b, to), true
}

// appendServer appends the server of a question, nothing for the zero Resolver. The last byte tells an address from a name.
func appendServer(b []byte, to Resolver) []byte {
	switch {
	case to.Addr.Addr().IsValid():
		a := to.Addr.Addr().As16()
		return append(binary.BigEndian.AppendUint16(append(b, a[:]...), to.Addr.Port()), 'a')
	case to.Name != "":
		return append(binary.BigEndian.AppendUint16(append(b, to.Name...), to.Addr.Port()), 'n')
	}
	return b
}

// sharedOptions reports whether the answer is the same for all askers in spite of these options. That is so for
// options that concern only the connection to the next server.
func sharedOptions(options []byte) bool {
	for len(options) >= 4 {
		switch binary.BigEndian.Uint16(options) {
		case optionCookie, optionAlive, optionPad:
		default:
			return false
		}
		n := 4 + int(binary.BigEndian.Uint16(options[2:]))
		if n > len(options) {
			return false
		}
		options = options[n:]
	}
	return len(options) == 0
}

// get returns the cached answer for a key, as the asker of msg needs it: see asAsked. It uses the capacity of b.
func (c *cache) get(b, key, msg []byte, q *question, now time.Time) (out []byte, truncated, ok bool) {
	c.mu.Lock()
	e := c.byKey[string(key)]
	if e != nil && !now.Before(e.until) {
		c.remove(e)
		e = nil
	}
	if e == nil {
		c.mu.Unlock()
		return b, false, false
	}
	e.prev.next, e.next.prev = e.next, e.prev
	c.first(e)
	c.mu.Unlock()
	age := uint32(max(now.Sub(e.stored), 0) / time.Second)
	out, truncated = asAsked(b, e.msg, msg, q, age)
	return out, truncated, true
}

// put stores the answer to the question of a key if it may be cached. plain is the result of plainAnswer.
func (c *cache) put(key string, plain []byte, qtype uint16, now time.Time) {
	life := lifeOf(plain, qtype)
	if life <= 0 || len(plain) > maxCached {
		return
	}
	e := &cached{key: key, msg: plain, stored: now, until: now.Add(min(life, maxLife))}
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.byKey[key]; old != nil {
		c.remove(old)
	}
	c.byKey[key] = e
	c.held += e.size()
	c.first(e)
	for len(c.byKey) > c.entries || c.held > c.bytes {
		c.remove(c.ring.prev)
	}
}

func (e *cached) size() int { return entryCost + len(e.key) + len(e.msg) }

// first puts e at the front of the ring. The caller holds c.mu.
func (c *cache) first(e *cached) {
	e.prev, e.next = &c.ring, c.ring.next
	e.prev.next, e.next.prev = e, e
}

// remove removes e. The caller holds c.mu.
func (c *cache) remove(e *cached) {
	e.prev.next, e.next.prev = e.next, e.prev
	delete(c.byKey, e.key)
	c.held -= e.size()
}

// usage returns how many answers are stored and how many bytes they take.
func (c *cache) usage() (entries, bytes int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.byKey), c.held
}

// plainAnswer returns a copy of a resolver's answer that can be given to other askers of the same question: without
// the OPT record, which was for the asker, and with the TTL of a negative answer according to RFC 2308, section 5. It
// drops records after the OPT record, because the additional section is no promise. It returns nil for an answer that
// is only for its asker: one that was truncated, is signed, has an OPT record with unknown content, or cannot be read
// to its end. resp has been checked by matches.
func plainAnswer(resp []byte, qtype uint16) []byte {
	flags := binary.BigEndian.Uint16(resp[2:])
	if flags&flagTC != 0 || binary.BigEndian.Uint16(resp[4:]) != 1 || len(resp) > maxMessage {
		return nil
	}
	size, kept, alone, opt := 0, [3]uint16{}, false, false
	start, ok := walkRecords(resp, func(section int, typ uint16, record []byte) bool {
		switch typ {
		case typeOPT:
			alone = alone || opt || section != additional || record[0] != 0 || !sharedOPT(record)
			opt = true
		case typeTSIG, typeSIG:
			alone = alone || section == additional
		}
		if !opt {
			size += len(record)
			kept[section]++
		}
		return true
	})
	if !ok || alone {
		return nil
	}
	out := append([]byte(nil), resp[:start+size]...)
	for i, n := range kept {
		binary.BigEndian.PutUint16(out[6+2*i:], n)
	}
	binary.BigEndian.PutUint16(out[2:], flags&^flagAA)
	if isNegative(out, qtype) {
		walkRecords(out, func(section int, typ uint16, record []byte) bool {
			if section == authority && typ == typeSOA {
				at, ttl := negativeTTL(record)
				binary.BigEndian.PutUint32(record[at:], ttl)
			}
			return true
		})
	}
	return out
}

// sharedOPT reports whether an answer with this OPT record is the same for all askers of the question.
func sharedOPT(record []byte) bool {
	name, _ := skipName(record, 0, true)
	if len(record)-name < 10 || record[name+4] != 0 || record[name+5] != 0 { // the upper bits of the RCODE, and the version
		return false
	}
	for options := record[name+10:]; len(options) > 0; {
		if len(options) < 4 {
			return false
		}
		n := 4 + int(binary.BigEndian.Uint16(options[2:]))
		if n > len(options) {
			return false
		}
		// RFC 7871, section 7.3: a scope other than 0 means that other askers get other answers.
		if binary.BigEndian.Uint16(options) == optionECS && (n < 8 || options[7] != 0) {
			return false
		}
		options = options[n:]
	}
	return true
}

// isNegative reports whether an answer means that the name, or a record of the type, does not exist (RFC 2308,
// section 2).
func isNegative(msg []byte, qtype uint16) bool {
	switch binary.BigEndian.Uint16(msg[2:]) & 15 {
	case rcodeName:
		return true
	case 0:
	default:
		return false
	}
	found := false
	walkRecords(msg, func(section int, typ uint16, _ []byte) bool {
		found = found || section == answers && (typ == qtype || qtype == typeANY)
		return section == answers && !found
	})
	return !found
}

// negativeTTL returns the position of the TTL in an SOA record, and how long it allows a negative answer to be cached
// (RFC 2308, section 5).
func negativeTTL(record []byte) (at int, ttl uint32) {
	at, ttl = recordTTL(record)
	if len(record)-at < 6+20 {
		return at, 0
	}
	return at, min(ttl, plainTTL(binary.BigEndian.Uint32(record[len(record)-4:])))
}

// recordTTL returns the position of a record's TTL and its value.
func recordTTL(record []byte) (at int, ttl uint32) {
	name, _ := skipName(record, 0, true)
	at = name + 4
	return at, plainTTL(binary.BigEndian.Uint32(record[at:]))
}

// plainTTL returns a TTL, or 0 if its highest bit is set (RFC 2181, section 8).
func plainTTL(ttl uint32) uint32 {
	if ttl > 1<<31-1 {
		return 0
	}
	return ttl
}

// lifeOf returns how long an answer from plainAnswer may be cached; 0: not at all.
func lifeOf(plain []byte, qtype uint16) time.Duration {
	if plain == nil {
		return 0
	}
	switch binary.BigEndian.Uint16(plain[2:]) & 15 {
	case rcodeServer:
		return failureLife
	case 0, rcodeName:
	default:
		return 0
	}
	least, any, soa := uint32(1<<31-1), false, false
	walkRecords(plain, func(section int, typ uint16, record []byte) bool {
		_, ttl := recordTTL(record)
		least, any = min(least, ttl), true
		soa = soa || section == authority && typ == typeSOA
		return true
	})
	if !any || !soa && isNegative(plain, qtype) { // RFC 2308, section 5: a negative answer without SOA is not cached
		return 0
	}
	return time.Duration(least) * time.Second
}

// asAsked converts an answer from plainAnswer for the asker of msg: it gets the asker's ID, the question letter by
// letter (the case of a name may be the asker's proof that the answer belongs to the question), an OPT record if the
// asker sent one, TTLs reduced by age seconds, and no more bytes than the asker accepts. It uses the capacity of b,
// which is empty, or allocates if that is too small.
func asAsked(b, plain, msg []byte, q *question, age uint32) (out []byte, truncated bool) {
	out = append(b[:0], plain...)
	if age > 0 {
		walkRecords(out, func(_ int, _ uint16, record []byte) bool {
			at, ttl := recordTTL(record)
			binary.BigEndian.PutUint32(record[at:], ttl-min(ttl, age))
			return true
		})
	}
	copy(out[headerLen:q.end], msg[headerLen:q.end])
	if q.edns {
		out = append(out, 0, 0, typeOPT, ednsSize>>8, ednsSize&0xFF, 0, 0, q.do, 0, 0, 0)
		binary.BigEndian.PutUint16(out[10:], binary.BigEndian.Uint16(out[10:])+1)
	}
	flags := binary.BigEndian.Uint16(out[2:])&^(maskOpcode|flagRD|flagCD) | flagQR | q.flags&(flagRD|flagCD)
	if len(out) > q.size {
		if out, truncated = truncate(out, q.size); truncated {
			flags |= flagTC
		}
	}
	binary.BigEndian.PutUint16(out, q.id)
	binary.BigEndian.PutUint16(out[2:], flags)
	return out, truncated
}
