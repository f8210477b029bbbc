package dns

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/viasocks/viasocks/stack/atomicfile"
)

// A pool's file is text: a line with the version and the ranges; a line for each name, with its number and the time
// of its last use, in milliseconds of a clock that has no other meaning; and a line with the count and a checksum of
// everything before it.
const (
	fileMagic   = "viasocks-names 1"
	fileMax     = 64 << 20
	fileChunk   = 512 // entries copied while the pool is locked
	saveEvery   = 10 * time.Second
	saveBackoff = 5 * time.Minute // after a failure
	leftoverAge = time.Minute     // no save takes so long
)

var errDamaged = errors.New("it is damaged")

// Save writes the names and their addresses to a file of mode 600, which replaces path when it is complete and on the
// disk. If anything fails, path does not change. Names that are added meanwhile may or may not be included.
func (p *Pool) Save(path string) error { return atomicfile.ReplaceOnDisk(path, 0o600, p.SaveTo) }

// SaveTo writes what Save would write. The pool is locked for a few names at a time.
func (p *Pool) SaveTo(w io.Writer) error {
	sum := crc32.NewIEEE()
	out := io.MultiWriter(w, sum)
	b := fmt.Appendf(nil, "%s %v %v\n", fileMagic, p.v4, p.v6)
	count := 0
	for at, more := uint32(0), true; more; at += fileChunk {
		p.mu.Lock()
		more = int(at)+fileChunk < len(p.entries)
		for i := at; i < at+fileChunk && int(i) < len(p.entries); i++ {
			e := &p.entries[i]
			if e.len == 0 {
				continue
			}
			b = append(strconv.AppendUint(b, uint64(i), 10), ' ')
			b = append(strconv.AppendInt(b, e.until.Milliseconds(), 10), ' ')
			b = append(append(b, p.name(i)...), '\n')
			count++
		}
		p.mu.Unlock()
		if _, err := out.Write(b); err != nil {
			return err
		}
		b = b[:0]
	}
	_, err := fmt.Fprintf(w, "end %d %08x\n", count, sum.Sum32())
	return err
}

// saved is one line of the file.
type saved struct {
	i     uint32
	until int64
	name  string
}

// Load reads what Save wrote into a pool that has not given out any address, and returns the number of names. Each
// counts as given out just now. A missing file, or one for other ranges, contains none. A damaged file is an error,
// and the pool stays empty.
func (p *Pool) Load(path string) (int, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	n, err := p.LoadFrom(f)
	if err != nil {
		return 0, fmt.Errorf("cannot use %s: %w", path, err)
	}
	return n, nil
}

// LoadFrom reads what SaveTo wrote, as Load does.
func (p *Pool) LoadFrom(r io.Reader) (int, error) {
	all, err := p.read(io.LimitReader(r, fileMax))
	if err != nil {
		return 0, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.entries) > 0 {
		return 0, errors.New("cannot load names into a pool that is in use")
	}
	// Sort the newest first: if two lines have the same name or number, written while it moved, the older is no
	// longer true.
	slices.SortStableFunc(all, func(a, b saved) int { return cmp.Compare(b.until, a.until) })
	entries := uint32(0)
	for _, s := range all {
		if s.i < p.size {
			entries = max(entries, s.i+1)
		}
	}
	p.entries = make([]entry, entries)
	until := p.now() + p.ttl
	kept := all[:0]
	for _, s := range all {
		h := p.hash([]byte(s.name))
		if s.i >= p.size || p.entries[s.i].len > 0 || p.find([]byte(s.name), h) != none ||
			len(p.names)+len(s.name) > maxNameBytes {
			continue
		}
		p.put(s.i, []byte(s.name), h)
		p.entries[s.i].until = until
		kept = append(kept, s)
	}
	for _, s := range slices.Backward(kept) {
		p.link(s.i)
	}
	for i := range p.entries {
		if p.entries[i].len == 0 {
			p.entries[i].next, p.free = p.free, uint32(i)
		}
	}
	return len(kept), nil
}

// read checks the whole file before any of it is used.
func (p *Pool) read(r io.Reader) ([]saved, error) {
	sum := crc32.NewIEEE()
	in := bufio.NewReaderSize(r, 4096)
	line, err := in.ReadSlice('\n')
	if err != nil || !bytes.HasPrefix(line, []byte(fileMagic+" ")) {
		return nil, errors.New("it is not a file of names that viasocks wrote")
	}
	if string(line) != fmt.Sprintf("%s %v %v\n", fileMagic, p.v4, p.v6) {
		return nil, nil // the addresses are from other ranges and cannot be used
	}
	var all []saved
	for {
		_, _ = sum.Write(line)
		if line, err = in.ReadSlice('\n'); err != nil {
			return nil, errDamaged // the last line is missing
		}
		if bytes.HasPrefix(line, []byte("end ")) {
			if string(line) != fmt.Sprintf("end %d %08x\n", len(all), sum.Sum32()) {
				return nil, errDamaged
			}
			return all, nil
		}
		s, ok := parseSaved(line[:len(line)-1])
		if !ok || len(all) >= 2*maxNames {
			return nil, errDamaged
		}
		all = append(all, s)
	}
}

func parseSaved(line []byte) (s saved, ok bool) {
	number, rest, _ := bytes.Cut(line, []byte(" "))
	until, name, _ := bytes.Cut(rest, []byte(" "))
	i, err := strconv.ParseUint(string(number), 10, 32)
	if err != nil {
		return s, false
	}
	ms, err := strconv.ParseInt(string(until), 10, 64)
	if err != nil || !isHost(name) {
		return s, false
	}
	return saved{uint32(i), ms, string(name)}, true
}

// KeepFile saves the pool to path, if it has changed, until ctx ends, and once more at the end. A failure is logged
// and repeated later, because names work without the file.
func (p *Pool) KeepFile(ctx context.Context, path string, log *slog.Logger) {
	p.keepFile(ctx, path, saveEvery, saveBackoff, log)
}

func (p *Pool) keepFile(ctx context.Context, path string, every, backoff time.Duration, log *slog.Logger) {
	atomicfile.RemoveUnfinished(path, leftoverAge)
	p.mu.Lock()
	was := p.changes
	p.mu.Unlock()
	failed := false
	timer := time.NewTimer(every)
	defer timer.Stop()
	for over := false; !over; {
		wait := every
		select {
		case <-ctx.Done():
			over = true
		case <-timer.C:
		}
		p.mu.Lock()
		changes := p.changes
		p.mu.Unlock()
		if changes != was {
			switch err := p.Save(path); {
			case err == nil && failed:
				log.Info("the names of fake addresses are saved again", "file", path)
				fallthrough
			case err == nil:
				was, failed = changes, false
			default:
				if !failed {
					log.Warn("cannot save the names of fake addresses; after a restart programs may have to ask again", "file",
						path, "err", err)
				}
				failed, wait = true, backoff
			}
		}
		timer.Reset(wait)
	}
}
