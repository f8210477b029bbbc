package capture

import (
	"encoding/binary"
	"io"
	"time"
)

// Constants of pcapng.
const (
	blockSection   = 0x0A0D0D0A
	blockInterface = 1
	blockStats     = 5
	blockPacket    = 6

	byteOrderMagic = 0x1A2B3C4D
	linkRaw        = 101 // LINKTYPE_RAW: packets begin with their IP header

	optEnd     = 0
	optComment = 1

	optHardware    = 2 // of a section
	optOS          = 3
	optApplication = 4

	optName       = 2 // of an interface
	optResolution = 9

	optFlags     = 2 // of a packet
	optDropCount = 4

	optReceived = 4 // of statistics
	optDropped  = 5

	flagInbound, flagOutbound = 1, 2
)

// MaxComment limits a comment, in bytes.
const MaxComment = 1024

// Writer writes the blocks of one section with one interface. Each block is one Write.
type Writer struct {
	w   io.Writer
	buf []byte
}

// NewWriter writes the headers of the section and the interface.
func NewWriter(w io.Writer, application, device, comment string) (*Writer, error) {
	p := &Writer{w: w}
	p.begin(blockSection)
	p.u32(byteOrderMagic)
	p.u32(1) // version 1.0
	p.u64(^uint64(0))
	p.text(optComment, comment)
	p.text(optOS, "Linux")
	p.text(optApplication, application)
	p.end()
	if err := p.flush(); err != nil {
		return nil, err
	}
	p.begin(blockInterface)
	p.u32(linkRaw)
	p.u32(0) // no limit to a packet's length
	p.text(optName, device)
	p.option(optResolution, []byte{9}) // nanoseconds
	p.end()
	return p, p.flush()
}

// Packet is a packet that crossed the TUN.
type Packet struct {
	At     time.Time
	Data   []byte
	ToApp  bool
	Before uint64 // number of packets that were lost before it
}

// Packet writes a packet, with a comment if there is one.
func (p *Writer) Packet(k *Packet, comment string) error {
	p.begin(blockPacket)
	p.u32(0) // the interface
	ns := uint64(k.At.UnixNano())
	p.u32(uint32(ns >> 32))
	p.u32(uint32(ns))
	p.u32(uint32(len(k.Data)))
	p.u32(uint32(len(k.Data)))
	p.padded(k.Data)
	p.text(optComment, comment)
	flags := uint32(flagOutbound) // of the program
	if k.ToApp {
		flags = flagInbound
	}
	p.option(optFlags, binary.LittleEndian.AppendUint32(nil, flags))
	if k.Before > 0 {
		p.option(optDropCount, binary.LittleEndian.AppendUint64(nil, k.Before))
	}
	p.end()
	return p.flush()
}

// Stats writes the last block: the numbers of received and lost packets, and comments.
func (p *Writer) Stats(at time.Time, received, dropped uint64, comments []string) error {
	p.begin(blockStats)
	p.u32(0)
	ns := uint64(at.UnixNano())
	p.u32(uint32(ns >> 32))
	p.u32(uint32(ns))
	for _, c := range comments {
		p.text(optComment, c)
	}
	p.option(optReceived, binary.LittleEndian.AppendUint64(nil, received))
	p.option(optDropped, binary.LittleEndian.AppendUint64(nil, dropped))
	p.end()
	return p.flush()
}

func (p *Writer) u32(n uint32) { p.buf = binary.LittleEndian.AppendUint32(p.buf, n) }
func (p *Writer) u64(n uint64) { p.buf = binary.LittleEndian.AppendUint64(p.buf, n) }

func (p *Writer) padded(b []byte) {
	p.buf = append(p.buf, b...)
	p.buf = append(p.buf, make([]byte, -len(b)&3)...)
}

func (p *Writer) option(code uint16, b []byte) {
	p.buf = binary.LittleEndian.AppendUint16(p.buf, code)
	p.buf = binary.LittleEndian.AppendUint16(p.buf, uint16(len(b)))
	p.padded(b)
}

func (p *Writer) text(code uint16, s string) {
	if s != "" {
		p.option(code, []byte(s[:min(len(s), MaxComment)]))
	}
}

// begin starts a block; end fills in its length.
func (p *Writer) begin(kind uint32) {
	p.buf = p.buf[:0]
	p.u32(kind)
	p.u32(0)
}

func (p *Writer) end() {
	p.option(optEnd, nil)
	p.u32(0)
	n := uint32(len(p.buf))
	binary.LittleEndian.PutUint32(p.buf[4:], n)
	binary.LittleEndian.PutUint32(p.buf[n-4:], n)
}

func (p *Writer) flush() error {
	_, err := p.w.Write(p.buf)
	return err
}
