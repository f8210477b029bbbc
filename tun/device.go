package tun

import (
	"encoding/binary"
	"errors"
)

// HeaderLen is the length in bytes of struct virtio_net_hdr, which precedes each frame on a device opened with
// IFF_VNET_HDR (Documentation/networking/tuntap.rst; virtio 1.2, section 5.1.6).
const HeaderLen = 10

// Header flags and GSO types, with the values of linux/virtio_net.h.
const (
	NeedsCsum = 1 // the checksum at CsumStart+CsumOffset is not filled in yet and must not be verified
	DataValid = 2 // the checksum was verified

	GSONone  = 0
	GSOTCPv4 = 1
	GSOTCPv6 = 4
	GSOUDPL4 = 5    // a run of datagrams of GSOSize payload bytes; the last one may be shorter
	GSOECN   = 0x80 // a bit that is added to the TCP types
)

// Header is the offload header of one frame, struct virtio_net_hdr in host byte order.
type Header struct {
	Flags      uint8
	GSOType    uint8
	HdrLen     uint16 // length of all headers before the payload
	GSOSize    uint16 // payload bytes of each segment
	CsumStart  uint16 // offset at which the checksum starts
	CsumOffset uint16 // where to store the checksum, counted from CsumStart
}

// Put writes h to the first HeaderLen bytes of b.
func (h Header) Put(b []byte) {
	_ = b[HeaderLen-1]
	b[0], b[1] = h.Flags, h.GSOType
	binary.NativeEndian.PutUint16(b[2:], h.HdrLen)
	binary.NativeEndian.PutUint16(b[4:], h.GSOSize)
	binary.NativeEndian.PutUint16(b[6:], h.CsumStart)
	binary.NativeEndian.PutUint16(b[8:], h.CsumOffset)
}

// ParseHeader reads a Header from the first HeaderLen bytes of b, which must exist. Any content is accepted: the
// values are checked where they are used.
func ParseHeader(b []byte) Header {
	_ = b[HeaderLen-1]
	return Header{
		Flags: b[0], GSOType: b[1],
		HdrLen:     binary.NativeEndian.Uint16(b[2:]),
		GSOSize:    binary.NativeEndian.Uint16(b[4:]),
		CsumStart:  binary.NativeEndian.Uint16(b[6:]),
		CsumOffset: binary.NativeEndian.Uint16(b[8:]),
	}
}

// Offload is the set of offloads that the kernel has agreed to for a device.
type Offload uint8

const (
	VnetHdr Offload = 1 << iota // frames carry a Header; checksum offload
	TSO                         // TCP super-segments, both families
	USO                         // UDP super-frames (GSO_UDP_L4), both families
)

// MaxFrame is the length of the longest frame: an IPv6 header and 65,535 bytes after it. A read buffer must be at
// least this long.
const MaxFrame = 40 + 65535

var (
	// ErrAgain means that no frame is available now.
	ErrAgain = errors.New("no frame")
	// ErrTooLong means that the frame did not fit the buffer, or that the kernel does not accept one this long. The
	// frame is lost; the device keeps working.
	ErrTooLong = errors.New("frame too long")
)

// Device is an open TUN device. It moves whole IP frames, each with its offload header.
type Device interface {
	Name() string
	MTU() int // of the interface, in bytes, as set when it was opened
	Offload() Offload

	// Read reads one frame into b and its header into h; without VnetHdr the header is zero. With wait, it blocks
	// until a frame arrives or the device is closed (os.ErrClosed). Without wait, it returns ErrAgain at once if
	// there is none. Only one goroutine may call Read at a time. h and b are not kept.
	Read(h *Header, b []byte, wait bool) (n int, err error)

	// Write writes one frame, which is the concatenation of parts. It may be called concurrently and does not block:
	// if the device is full, it returns ErrAgain and the frame is lost. h and parts are neither kept nor changed.
	Write(h *Header, parts [][]byte) error

	// Close closes the device and ends a blocked Read. It may be called twice and from any goroutine.
	Close() error
}
