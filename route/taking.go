package route

import (
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// The programs' own datagrams show whether a server accepts names in the headers of datagrams; this is learned once for
// each server. All servers in the manual's table that carry UDP do. Some answer from the name, others from the address
// that they found for it.

const (
	takesProofs  = 2                // names that must show something if one alone might do so by chance
	takesNoneFor = 30 * time.Minute // how long it is remembered that a server accepts no names
	takesDoubt   = 8                // names in a row without an answer after which it is no longer certain that it does
)

// taking is how a server treats names in the headers of datagrams.
type taking uint32

const (
	takingUnknown taking = iota
	takesNames
	takesNone // nothing comes back
	takesEnd  // it ends the association
)

var takingWords = [...]string{takingUnknown: "", takesNames: "yes", takesNone: "no", takesEnd: "no"}

// nameTaking is what is known about one server. Its methods may be called from any goroutine.
type nameTaking struct {
	state  atomic.Uint32
	until  atomic.Int64 // how long takesNone and takesEnd are valid
	asName atomic.Bool  // its answers have the name as their source

	mu      sync.Mutex
	yes     []string // names that answered, while nothing is known
	no      []string // names that answered only after they were written to by address
	ends    []string // names after which the server ended the association
	unheard int      // names in a row that have not answered
}

// load returns the state at now.
func (t *nameTaking) load(now int64) taking {
	s := taking(t.state.Load())
	if (s == takesNone || s == takesEnd) && now >= t.until.Load() {
		return takingUnknown
	}
	return s
}

// know sets the state and forgets the evidence. mu is held.
func (t *nameTaking) know(s taking, until int64) {
	t.until.Store(until)
	t.state.Store(uint32(s))
	t.yes, t.no, t.ends, t.unheard = nil, nil, nil, 0
}

func (t *nameTaking) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.know(takingUnknown, 0)
	t.asName.Store(false)
}

// answered records an answer to a datagram to a name. Unless it is certain that it came from the name, two names are
// needed.
func (t *nameTaking) answered(name string, certain bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.unheard = 0; taking(t.state.Load()) == takesNames {
		return
	}
	if shown(&t.yes, name) || certain {
		t.know(takesNames, 0)
	}
}

// unanswered records that a name answered only after it was written to by address.
func (t *nameTaking) unanswered(name string, now int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if taking(t.state.Load()) != takesNames && shown(&t.no, name) {
		t.know(takesNone, now+int64(takesNoneFor))
	}
}

// ended records that the server ended the association as soon as something was sent to a name.
func (t *nameTaking) ended(name string, now int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if taking(t.state.Load()) != takesNames && shown(&t.ends, name) {
		t.know(takesEnd, now+int64(takesNoneFor))
	}
}

// sent records that another name is written to for the first time.
func (t *nameTaking) sent() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.unheard++; t.unheard > takesDoubt && taking(t.state.Load()) == takesNames {
		t.know(takingUnknown, 0)
	}
}

// shown adds a name to names and reports whether they are sufficient evidence.
func shown(names *[]string, name string) bool {
	if !slices.Contains(*names, name) {
		*names = append(*names, name)
	}
	return len(*names) >= takesProofs
}

// takings is what is known about the servers of an upstream.
type takings struct {
	mu       sync.Mutex
	byServer map[string]*nameTaking
	last     atomic.Pointer[nameTaking] // of the server of the latest association
}

// of returns what is known about a server.
func (t *takings) of(server string) *nameTaking {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := t.byServer[server]
	if k == nil {
		if t.byServer == nil {
			t.byServer = make(map[string]*nameTaking)
		}
		k = &nameTaking{}
		t.byServer[server] = k
	}
	t.last.Store(k)
	return k
}

func (t *takings) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, k := range t.byServer {
		k.forget()
	}
}

// word returns "yes" or "no" for status; it is empty if this is unknown, or not the same for all servers.
func (t *takings) word(now int64) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	word, first := "", true
	for server, k := range t.byServer {
		if server == "" { // before the first association
			continue
		}
		w := takingWords[k.load(now)]
		if !first && w != word {
			return ""
		}
		word, first = w, false
	}
	return word
}

// learnNames calls f, which records something about a server of up, and logs it if the state has become known.
func (b *base) learnNames(up *upstream, t *nameTaking, f func(*nameTaking)) {
	if t == nil {
		return
	}
	before := t.load(b.now())
	f(t)
	if now := t.load(b.now()); now != before && now != takingUnknown {
		b.log.post(slog.LevelDebug, "whether the server takes names in datagrams is known", slog.String("upstream", up.name),
			slog.String("takes", takingWords[now]), slog.Bool("ends", now == takesEnd))
	}
}
