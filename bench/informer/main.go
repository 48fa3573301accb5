// Command informer measures the informer of the Go client at the fleet that the environment names. It prints a line of JSON when
// all is known, and another, of the changes since, when its standard input ends.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	virtfleet "virtfleet.dev/go"
	computev1 "virtfleet.dev/go/compute/v1"
	"virtfleet.dev/go/informer"
)

// label holds the time of a change, in nanoseconds: bench/churn.py sets it.
const label = "at"

type known struct {
	Objects        int     `json:"objects"`
	SyncSeconds    float64 `json:"sync_seconds"`
	BytesPerObject float64 `json:"bytes_per_object"`
	MessageBytes   float64 `json:"message_bytes"`
}

type changed struct {
	Seen            int     `json:"seen"`
	Seconds         float64 `json:"seconds"`
	LagMedianMillis float64 `json:"lag_p50_ms"`
	LagP99Millis    float64 `json:"lag_p99_ms"`
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	client, err := virtfleet.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	if err = errors.Join(measure(ctx, client), client.Close()); err != nil {
		log.Fatal(err)
	}
}

// sights is when which changes were seen.
type sights struct {
	mutex sync.Mutex
	lags  []time.Duration
	first time.Time
	last  time.Time
}

func (s *sights) see(before, now *computev1.Domain) {
	value := now.GetLabels()[label]
	if value == "" || before.GetLabels()[label] == value {
		return
	}
	sent, err := strconv.ParseInt(value, 10, 64)
	if err != nil {
		return
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.last = time.Now()
	if s.first.IsZero() {
		s.first = s.last
	}
	s.lags = append(s.lags, s.last.Sub(time.Unix(0, sent)))
}

func measure(parent context.Context, client *virtfleet.Client) error {
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	domains, seen, out := informer.Domains(client), &sights{}, json.NewEncoder(os.Stdout)
	domains.Handle(informer.Handler[*computev1.Domain]{Changed: seen.see})
	before, began := heap(), time.Now()
	go func() { cancel(domains.Run(ctx)) }()
	if err := domains.WaitSynced(ctx); err != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	took, count := time.Since(began), domains.Len()
	if count == 0 {
		return errors.New("the fleet has no domains")
	}
	each := float64(heap()-before) / float64(count)
	size := 0
	for domain := range domains.All() {
		size += proto.Size(domain)
	}
	if err := out.Encode(known{count, took.Seconds(), each, float64(size) / float64(count)}); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	seen.mutex.Lock()
	defer seen.mutex.Unlock()
	if len(seen.lags) == 0 {
		return errors.Join(errors.New("no change was seen"), context.Cause(ctx))
	}
	slices.Sort(seen.lags)
	return out.Encode(changed{
		len(seen.lags), seen.last.Sub(seen.first).Seconds(), millis(seen.lags[len(seen.lags)/2]), millis(seen.lags[len(seen.lags)*99/100]),
	})
}

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return stats.HeapAlloc
}
