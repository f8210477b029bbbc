package tun

import (
	"bytes"
	"testing"
)

func TestHeaderLayout(t *testing.T) {
	// struct virtio_net_hdr of linux/virtio_net.h, little-endian hosts: the tests run on no others.
	b := []byte{NeedsCsum, GSOTCPv4, 54, 0, 0x78, 5, 34, 0, 16, 0}
	h := Header{Flags: NeedsCsum, GSOType: GSOTCPv4, HdrLen: 54, GSOSize: 1400, CsumStart: 34, CsumOffset: 16}
	if got := ParseHeader(b); got != h {
		t.Errorf("ParseHeader: %+v", got)
	}
	got := make([]byte, HeaderLen)
	if h.Put(got); !bytes.Equal(got, b) {
		t.Errorf("Put: % x", got)
	}
}

func FuzzHeader(f *testing.F) {
	f.Add(make([]byte, HeaderLen))
	f.Add([]byte{1, 5, 28, 0, 0xb0, 4, 20, 0, 6, 0})
	f.Add(bytes.Repeat([]byte{0xff}, HeaderLen+3))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < HeaderLen {
			return
		}
		got := make([]byte, HeaderLen)
		ParseHeader(b).Put(got)
		if !bytes.Equal(got, b[:HeaderLen]) {
			t.Errorf("% x became % x", b[:HeaderLen], got)
		}
	})
}

// FuzzWrite gives the kernel arbitrary frames: each is taken or refused by an error that says what is wrong with it, and
// the device works on.
func FuzzWrite(f *testing.F) {
	udp, l3, l4 := packet{src: ap(far4, 1), dst: ap(app4, 2), proto: protoUDP, payload: make([]byte, 50)}.marshal(true)
	hdr := make([]byte, HeaderLen)
	Header{
		Flags:      NeedsCsum,
		GSOType:    GSOUDPL4,
		GSOSize:    20,
		HdrLen:     uint16(l3 + l4),
		CsumStart:  uint16(l3),
		CsumOffset: 6,
	}.Put(
		hdr,
	)
	f.Add(hdr, udp, 20)
	f.Add(make([]byte, HeaderLen), udp[:21], 1)
	f.Add(bytes.Repeat([]byte{0xff}, HeaderLen), []byte{0x60}, 0)
	f.Add(hdr, []byte{}, 0)
	d := kernelTUN(f, true, OffloadFull)
	f.Fuzz(func(t *testing.T, hdr, frame []byte, cut int) {
		if len(hdr) < HeaderLen || cut < 0 || cut > len(frame) {
			return
		}
		h := ParseHeader(hdr)
		switch err := d.Write(&h, [][]byte{frame[:cut], frame[cut:]}); err {
		case nil, ErrAgain, ErrBadFrame, ErrTooLong:
		default:
			t.Errorf("%+v, % x: %v", h, frame, err)
		}
		for range 10 { // ICMP errors may have come back
			if _, err := d.Read(&h, make([]byte, MaxFrame), false); err == ErrAgain {
				return
			} else if err != nil {
				t.Fatal(err)
			}
		}
	})
}
