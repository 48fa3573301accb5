package informer

import (
	"fmt"
	"runtime"
	"testing"

	"google.golang.org/protobuf/proto"

	computev1 "virtfleet.dev/go/compute/v1"
)

// fleetOf returns domain number of a fleet of 50 nodes, with two disks and a card, as a service sends it.
func fleetOf(number int) *computev1.Domain {
	node, mac := fmt.Sprintf("nodes/n%d", number%50), fmt.Sprintf("06:02:%02x:%02x:%02x:01", number>>16, number>>8&0xff, number&0xff)
	spec := &computev1.DomainSpec{
		Driver: proto.String("qemu"),
		Cpu:    &computev1.Cpu{VcpuCount: proto.Int32(4), Model: proto.String("Skylake-Server-v1")},
		Memory: &computev1.Memory{MaximumBytes: proto.Int64(4 << 30)},
		Disks: map[string]*computev1.Disk{
			"root": {Source: &computev1.Disk_Volume{Volume: fmt.Sprintf("pools/default/volumes/root-%d", number)}},
			"data": {Source: &computev1.Disk_Volume{Volume: fmt.Sprintf("pools/default/volumes/data-%d", number)}},
		},
		Interfaces: map[string]*computev1.Interface{
			"lan": {Source: &computev1.Interface_Network{Network: "networks/default"}, MacAddress: proto.String(mac)},
		},
	}
	return &computev1.Domain{
		Name: fmt.Sprintf("%s/domains/web-%d", node, number), Uid: fmt.Sprintf("%08x-0000-4000-8000-000000000000", number),
		Labels: map[string]string{"app": "web", "shard": fmt.Sprint(number % 100)}, Generation: 1, Etag: fmt.Sprintf("%08x.1", number),
		Spec: spec,
		Status: &computev1.DomainStatus{
			State: computev1.DomainState_DOMAIN_STATE_RUNNING, Active: true, ActiveSpec: spec, ResolvedSpec: spec,
			Addresses:  []*computev1.GuestAddress{{Address: fmt.Sprintf("10.%d.%d.%d", number>>16, number>>8&0xff, number&0xff)}},
			Interfaces: []*computev1.InterfaceStatus{{DeviceId: "lan", MacAddress: mac, HostDevice: "vft1a2b3c"}},
		},
	}
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return stats.HeapAlloc
}

// bytesEach fills an informer and returns its bytes for each object, and those of the object's message.
func bytesEach(many int, options ...Option) (kept, message float64) {
	d := Domains(nil, options...)
	before := heap()
	size := 0
	for number := range many {
		domain := fleetOf(number)
		size += proto.Size(domain)
		d.take(&news[*computev1.Domain]{changes: []change[*computev1.Domain]{{isPut: true, put: domain}}})
	}
	after := heap()
	runtime.KeepAlive(d)
	return float64(after-before) / float64(many), float64(size) / float64(many)
}

func TestManyDomainsTakeLittleMoreThanTheirMessages(t *testing.T) {
	kept, message := bytesEach(10_000)
	t.Logf("%.0f bytes each, of which the message is %.0f", kept, message)
	// Names, four unique values and seven places in indexes are about 900 bytes.
	if kept > message+1200 {
		t.Errorf("%.0f bytes each, of which the message is %.0f", kept, message)
	}
}

func BenchmarkFiftyThousandDomains(b *testing.B) {
	for name, options := range map[string][]Option{"packed": nil, "decoded": {Decoded()}} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				kept, message := bytesEach(50_000, options...)
				b.ReportMetric(kept, "bytes/object")
				b.ReportMetric(message, "message-bytes/object")
			}
		})
	}
}
