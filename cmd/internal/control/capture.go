package control

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
)

// Capture tells what to capture, and how much. Zero values: all flows; the default limits.
type Capture struct {
	Flow        uint64
	Program     string
	Destination string

	Count int
	Bytes int64
	Time  time.Duration
}

func (c Capture) query() string {
	q := url.Values{}
	set := func(name, value string) {
		if value != "" && value != "0" {
			q.Set(name, value)
		}
	}
	set("flow", strconv.FormatUint(c.Flow, 10))
	set("program", c.Program)
	set("destination", c.Destination)
	set("count", strconv.Itoa(c.Count))
	set("bytes", strconv.FormatInt(c.Bytes, 10))
	set("ms", strconv.FormatInt(c.Time.Milliseconds(), 10))
	return q.Encode()
}

func captureOf(q url.Values) (c Capture, err error) {
	number := func(name string) (n int64) {
		if text := q.Get(name); text != "" && err == nil {
			if n, err = strconv.ParseInt(text, 10, 64); err != nil || n < 0 {
				err = fmt.Errorf("%s must be a number", name)
			}
		}
		return n
	}
	c.Flow, c.Count, c.Bytes = uint64(number("flow")), int(number("count")), number("bytes")
	c.Time = time.Duration(min(number("ms"), int64(1<<40))) * time.Millisecond
	c.Program, c.Destination = q.Get("program"), q.Get("destination")
	return c, err
}

// capture answers with pcapng, block by block as packets arrive.
func (s *Server) capture(w http.ResponseWriter, r *http.Request) {
	p, _ := r.Context().Value(peerKey{}).(privsock.Peer)
	if !p.Owner() && !p.In(s.o.Group) {
		s.refuse(w, p, mayLook)
		return
	}
	c, err := captureOf(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(s.closing, cancel)()
	out := &streamWriter{w: w, rc: http.NewResponseController(w), begin: func() {
		// A capture shows what other users send and receive, so the log names who asked for it.
		s.o.Log.Info("control: capture", "uid", p.UID, "pid", p.PID)
	}}
	_ = out.rc.SetReadDeadline(time.Time{}) // the deadline of the request must not end the stream
	if err := s.o.Backend.Capture(ctx, c, out); err != nil && !out.began {
		http.Error(w, err.Error(), http.StatusConflict)
	}
}

// streamWriter sends each Write at once. It fails if the client does not read for answerTimeout.
type streamWriter struct {
	w     http.ResponseWriter
	rc    *http.ResponseController
	begin func()
	began bool
}

// Write implements io.Writer.
func (s *streamWriter) Write(b []byte) (int, error) {
	if !s.began {
		s.began = true
		s.begin()
		s.w.Header().Set("Content-Type", "application/x-pcapng")
		s.w.WriteHeader(http.StatusOK)
	}
	if err := s.rc.SetWriteDeadline(time.Now().Add(answerTimeout)); err != nil {
		return 0, err
	}
	n, err := s.w.Write(b)
	if err == nil {
		err = s.rc.Flush()
	}
	return n, err
}

// The parts of a pcapng block that Capture must know: the type, the length, and the length again.
const (
	blockHead   = 8
	blockPacket = 6
	minBlock    = 12
	maxBlock    = 1 << 20
)

// Capture writes pcapng to w until the capture is over or ctx ends, and returns the number of packets. Only whole
// blocks are written, so that the file is valid however the capture ends.
func (c *Client) Capture(ctx context.Context, what Capture, w io.Writer) (packets int, err error) {
	req, err := http.NewRequestWithContext(ctx, "GET", "http://viasocks/v1/capture?"+what.query(), nil)
	if err != nil {
		return 0, err
	}
	stream := c.http
	stream.Timeout = 0
	resp, err := stream.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return 0, nil
		}
		return 0, c.explain(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, refusal("capture", resp)
	}
	out := bufio.NewWriter(w)
	in := bufio.NewReaderSize(resp.Body, 64<<10)
	block := make([]byte, 0, 64<<10)
	for {
		if block, err = readBlock(in, block); err != nil {
			break
		}
		if _, err = out.Write(block); err != nil {
			return packets, fmt.Errorf("cannot write the capture: %w", err)
		}
		if binary.LittleEndian.Uint32(block) == blockPacket {
			packets++
		}
		if in.Buffered() == 0 { // a reader of the file sees the block at once
			if err = out.Flush(); err != nil {
				return packets, fmt.Errorf("cannot write the capture: %w", err)
			}
		}
	}
	if ferr := out.Flush(); ferr != nil {
		return packets, fmt.Errorf("cannot write the capture: %w", ferr)
	}
	if ctx.Err() != nil || errors.Is(err, io.EOF) {
		return packets, nil
	}
	return packets, fmt.Errorf("cannot capture any longer: %w", err)
}

// readBlock reads one block into b. It returns io.EOF if the stream ends between two blocks.
func readBlock(r io.Reader, b []byte) ([]byte, error) {
	b = b[:blockHead]
	if _, err := io.ReadFull(r, b); err != nil {
		return b, err
	}
	n := binary.LittleEndian.Uint32(b[4:])
	if n < minBlock || n > maxBlock || n%4 != 0 {
		return b, errors.New("viasocks sent something else than pcapng")
	}
	if uint32(cap(b)) < n {
		b = append(make([]byte, 0, n), b...)
	}
	b = b[:n]
	_, err := io.ReadFull(r, b[blockHead:])
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return b, err
}
